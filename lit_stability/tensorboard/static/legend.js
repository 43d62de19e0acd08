/** The legend of the colours and marks of the heat map. */

import { el } from "./dom.js";

/** @returns {HTMLElement} */
export function legend() {
  const scale = el(
    "span",
    { class: "scale" },
    ...["÷1000", "rolling median of the layer", "×1000"].map((text) => el("span", {}, text)),
  );
  return el(
    "div",
    { class: "legend" },
    el(
      "span",
      { class: "scale-box" },
      el("span", { class: "gradient", "aria-hidden": "true" }),
      scale,
    ),
    swatch("non-finite", "NaN or Inf (▾ above the map)"),
    swatch("zero", "exactly zero"),
    swatch("undone", "↶ rolled back"),
  );
}

function swatch(kind, text) {
  return el(
    "span",
    { class: "swatch-box" },
    el("span", { class: `swatch ${kind}`, "aria-hidden": "true" }),
    text,
  );
}
