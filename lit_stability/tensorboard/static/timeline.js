/**
 * The time line: all measurements of a run by attempt, with its incidents.
 *
 * All panels share the x axis. An attempt is one try of an optimizer step. The counter of attempts
 * never decreases, so attempts that a rollback undid are still visible, and shaded.
 */

import { BANDS, drawBand } from "./bands.js";
import { gutter, layeredCanvas, vertical } from "./canvas.js";
import { slice } from "./curve.js";
import { button, choice, el, section } from "./dom.js";
import { drawPins, drawSpans, pinAt, undoneBy } from "./marks.js";
import { drawPanel, drawXAxis } from "./panels.js";
import { linearScale, nearest } from "./scales.js";
import { stepNotes, stepRows, stepTitle } from "./step_words.js";
import { fullRange, rangeInView } from "./store.js";
import { colours } from "./theme.js";
import { attachCursor, createTooltip } from "./tooltip.js";
import { attachZoom } from "./zoom.js";

const [RIGHT, TOP, GAP, BAND, AXIS] = [26, 30, 12, 20, 26];

const KEY = [
  "by attempt: rollbacks decrease the step, not the attempt",
  "× NaN or Inf",
  "shaded: undone by a rollback",
].join(" · ");

const PANELS = [
  { title: "loss", height: 120, lines: [["loss", "loss"]], switched: true },
  {
    title: "gradient norm",
    height: 120,
    lines: [["grad_norm", "norm"], ["clip_threshold", "clip", [5, 3], "clip threshold"]],
    switched: true,
  },
  { title: "effective learning rate", height: 64, lines: [["learning_rate", "rate"]] },
  { title: "update / weight", height: 64, lines: [["update_ratio", "update"]], switched: true },
];

/** @returns {HTMLElement} the section, which is updated when the store changes. */
export function createTimeline(store) {
  const layers = layeredCanvas(
    "Time line by attempt. Plus and minus zoom, arrows pan, 0 shows all, Shift with arrows reads values.",
    () => draw(),
  );
  const tooltip = createTooltip(layers.element);
  let at = -1;
  const x = () =>
    linearScale(
      rangeInView(store.get()),
      [gutter(layers.width()), layers.width() - RIGHT],
      layers.width() / 110,
    );
  const draw = () => drawAll(store.get(), layers, x());
  const point = (i, py) => {
    at = i;
    showCursor(store.get(), layers, x(), tooltip, i, py);
  };

  attachZoom(layers.element, {
    x,
    range: () => rangeInView(store.get()),
    full: () => fullRange(store.get()),
    show: (range) => store.set({ range }),
    clamp: (px) => Math.min(Math.max(px, gutter(layers.width())), layers.width() - RIGHT),
    click: (px) => {
      const { incidents } = store.get();
      const found = pinAt(incidents, x(), rangeInView(store.get()), px);
      if (found) store.set({ incident: found.id });
    },
  });
  attachCursor(layers.element, {
    point: (px, py) => {
      const { steps } = store.get();
      const inside = px >= gutter(layers.width()) - 8 && px <= layers.width() - RIGHT + 8;
      if (!steps || steps.length === 0 || !inside) return leave();
      return point(nearest(steps.attempt, x().value(px), steps.length), py);
    },
    step: (by) => moveCursor(store.get(), at, by, (i) => point(i, TOP)),
    leave: () => leave(),
  });
  const leave = () => {
    at = -1;
    tooltip.hide();
    layers.beginCursor();
  };
  store.on(["steps", "incidents", "incident", "range", "scale", "dark"], draw);
  return section("timeline", "Time line", controls(store), layers.element);
}

function controls(store) {
  const scale = choice(
    "Scale of loss and norm",
    [["log", "log"], ["linear", "linear"]],
    store.get().scale,
    (value) => store.set({ scale: value }),
  );
  const all = button("Show all", () => store.set({ range: null }), { class: "show-all" });
  const follow = () => {
    scale.choose(store.get().scale);
    all.disabled = store.get().range === null;
  };
  store.on(["scale", "range"], follow);
  follow();
  return [scale, all, el("span", { class: "aside" }, KEY)];
}

function moveCursor({ steps, range }, at, by, point) {
  if (!steps || steps.length === 0) return;
  const start = at >= 0
    ? at
    : nearest(steps.attempt, range ? range[0] : -Infinity, steps.length) - by;
  point(Math.min(Math.max(start + by, 0), steps.length - 1));
}

function drawAll(state, layers, x) {
  const { steps, incidents, incident, scale } = state;
  if (!steps || steps.length === 0) return;
  const shown = PANELS.filter(({ lines }) =>
    lines.some(([field]) => steps[field]?.some(Number.isFinite))
  );
  const bands = BANDS.filter(({ field }) => steps[field]?.some(Number.isFinite));
  const bottom = TOP + shown.reduce((sum, each) => sum + each.height + GAP, 0) +
    bands.length * (BAND + 4);
  const context = layers.begin(bottom + AXIS);
  const palette = colours();
  const edges = [gutter(layers.width()), layers.width() - RIGHT];
  const indices = slice(steps.attempt, rangeInView(state), steps.length);
  const view = { context, steps, xs: steps.attempt, x, edges, indices, palette };
  drawSpans(context, incidents, x, edges, TOP, bottom, palette);
  let top = TOP;
  for (const panel of shown) {
    drawPanel(view, panel, top, panel.switched && scale === "log");
    top += panel.height + GAP;
  }
  for (const band of bands) {
    drawBandRow(view, band, top);
    top += BAND + 4;
  }
  drawXAxis(view, bottom, "attempt");
  drawPins(context, incidents, incident, x, rangeInView(state), 13, bottom, palette);
}

function drawBandRow({ context, steps, x, edges, palette, indices }, band, top) {
  context.textAlign = "left";
  context.fillStyle = palette.ink;
  context.fillText(band.title, 0, top + BAND / 2);
  context.fillStyle = palette.surface;
  context.fillRect(edges[0], top, edges[1] - edges[0], BAND);
  drawBand(context, band, steps, indices, x, edges, top, BAND, palette);
}

function showCursor({ steps, incidents }, layers, x, tooltip, i, py) {
  const context = layers.beginCursor();
  const at = x.px(steps.attempt[i]);
  vertical(context, at, TOP - 6, layers.element.clientHeight - AXIS, colours().ink);
  const notes = stepNotes(steps, i, incidents, undoneBy(incidents, steps.attempt[i]));
  tooltip.show([at, py], stepTitle(steps, i), stepRows(steps, i), notes);
}
