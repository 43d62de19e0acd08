/** Colours for canvases, read from the style sheet, which is the only place that defines them. */

const NAMES = [
  ...["ink", "muted", "line", "surface", "page", "accent", "shade", "hatch"],
  ...["loss", "norm", "clip", "rate", "update", "other", "band"],
  ...["recovered", "contained", "recurring", "observed", "handled", "stopped", "unresolved"],
  "open",
  ...["bad", "below", "middle", "above"],
];

/** @returns {Record<string, string>} colour by name, in the current mode. */
export function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(
    NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]),
  );
}

/** The mark of each outcome; outcomes also differ in shape, not only in colour. */
const MARKS = {
  recovered: { shape: "circle", sign: "●", word: "recovered" },
  contained: { shape: "triangle", sign: "△", word: "contained, not learning" },
  recurring: { shape: "ring", sign: "↻", word: "recurring" },
  observed: { shape: "ring", sign: "○", word: "observed" },
  handled: { shape: "circle", sign: "◐", word: "handled" },
  stopped: { shape: "square", sign: "■", word: "stopped" },
  unresolved: { shape: "triangle", sign: "▲", word: "unresolved" },
  open: { shape: "diamond", sign: "◆", word: "open" },
};

/** @returns {{shape: string, sign: string, word: string}} mark of an outcome. */
export const markOf = (outcome) => MARKS[outcome] ?? { ...MARKS.open, word: String(outcome) };

/** Returns the name of the colour of an outcome. */
export const colourOf = (outcome) => (outcome in MARKS ? outcome : "open");

/** Returns the three channels of "#rrggbb". */
export const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
