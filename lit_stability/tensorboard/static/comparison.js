/**
 * Compares two runs by step. Attempts that a rollback undid are omitted.
 */

import { gutter, layeredCanvas, mark, vertical } from "./canvas.js";
import { drawCurve, drawYAxis, slice, yScale } from "./curve.js";
import { el, replace, section } from "./dom.js";
import { summary } from "./incidents.js";
import { drawXAxis } from "./panels.js";
import { count, linearScale, nearest, ratio, short } from "./scales.js";
import { colourOf, colours, markOf } from "./theme.js";
import { attachCursor, createTooltip } from "./tooltip.js";

const [RIGHT, TOP, GAP, AXIS] = [26, 26, 12, 26];
const PANELS = [
  ["loss", "loss", 130],
  ["grad_norm", "gradient norm", 110],
  ["learning_rate", "effective learning rate", 70],
];

/**
 * @typedef {{run: string, steps: Columns, incidents: object[]}} Run
 * @returns {{element: HTMLElement, show: (other: Run|null, message?: Node) => void}}
 */
export function createComparison(store) {
  const layers = layeredCanvas(
    "Comparison of two runs by step. Shift with arrows reads values.",
    () => draw(),
  );
  const tooltip = createTooltip(layers.element);
  const [legend, message] = [el("div", { class: "legend" }), el("div", { class: "message" })];
  const element = section("comparison", "Comparison", [], legend, message, layers.element);
  let pair = null;
  let at = -1;
  const x = () =>
    linearScale(span(pair), [gutter(layers.width()), layers.width() - RIGHT], layers.width() / 110);
  const draw = () => pair && drawAll(pair, layers, x(), store.get());
  const point = (i, py) => {
    at = i;
    showCursor(pair, layers, x(), tooltip, i, py);
  };
  attachCursor(layers.element, {
    point: (px, py) => pair && point(nearest(pair[0].step, x().value(px), pair[0].length), py),
    step: (by) => pair && point(Math.min(Math.max(at + by, 0), pair[0].length - 1), TOP),
    leave: () => {
      tooltip.hide();
      layers.beginCursor();
    },
  });
  store.on(["scale", "dark"], draw);
  return {
    element,
    show(other, text) {
      const { run, steps, incidents } = store.get();
      pair = other && steps?.length && other.steps.length
        ? [named(run, steps, incidents), named(other.run, other.steps, other.incidents)]
        : null;
      element.hidden = !pair && !text;
      layers.element.hidden = !pair;
      replace(message, text);
      replace(legend, pair ? pair.map((each, i) => legendEntry(each, i)) : []);
      draw();
    },
  };
}

function named(run, steps, incidents) {
  return { run, incidents, ...kept(steps, incidents) };
}

/** Returns the samples that were neither rejected nor undone by a rollback; their steps increase. */
export function kept(steps, incidents) {
  const spans = incidents.flatMap((each) => each.spans);
  const indices = [];
  for (let i = 0; i < steps.length; i++) {
    const attempt = steps.attempt[i];
    if (steps.taken && steps.taken[i] === 0) continue;
    if (!spans.some(([from, to]) => attempt >= from && attempt <= to)) indices.push(i);
  }
  const columns = { length: indices.length };
  for (const field of ["step", ...PANELS.map(([field]) => field)]) {
    if (field in steps) columns[field] = Float64Array.from(indices, (i) => steps[field][i]);
  }
  return columns;
}

function span(pair) {
  const ends = pair.flatMap(({ step, length }) => (length > 0 ? [step[0], step[length - 1]] : []));
  return ends.length > 0 ? [Math.min(...ends), Math.max(...ends, ends[0] + 1)] : [0, 1];
}

function legendEntry({ run, incidents, loss, length }, i) {
  const last = length > 0 ? `, last loss ${short(loss[length - 1])}` : "";
  return el(
    "span",
    { class: "run" },
    el("span", { class: `stroke ${i === 0 ? "first" : "second"}`, "aria-hidden": "true" }),
    el("strong", {}, run),
    ` ${summary(incidents)}${last}`,
  );
}

function drawAll(pair, layers, x, { scale }) {
  const shown = PANELS.filter(([field]) => pair.some((each) => each[field]?.some(Number.isFinite)));
  const bottom = TOP + shown.reduce((sum, [, , height]) => sum + height + GAP, 0);
  const context = layers.begin(bottom + AXIS);
  const palette = colours();
  const edges = [gutter(layers.width()), layers.width() - RIGHT];
  let top = TOP;
  for (const [field, title, height] of shown) {
    drawPair(context, pair, field, title, {
      x,
      edges,
      palette,
      top,
      height,
      log: scale === "log" && field !== "learning_rate",
    });
    top += height + GAP;
  }
  drawXAxis({ context, x, palette, edges }, bottom, "step");
  pair.forEach((each, i) => drawPins(context, each.incidents, x, 10, bottom, palette, i));
}

function drawPair(context, pair, field, title, { x, edges, palette, top, height, log }) {
  const drawn = pair.filter((each) => field in each);
  const indices = drawn.map((each) => slice(each.step, span(pair), each.length));
  const longest = [0, Math.max(...drawn.map((each) => each.length))];
  const y = yScale(drawn.map((each) => each[field]), longest, [top + height, top + 16], log);
  context.textAlign = "left";
  context.fillStyle = palette.ink;
  context.fillText(`${title}${log ? " (log)" : ""}`, 0, top + 5);
  if (!y) return;
  drawYAxis(context, y, ...edges, palette);
  drawn.forEach((each, i) => {
    const second = each === pair[1];
    drawCurve(context, each.step, each[field], indices[i], x, y, {
      colour: second ? palette.other : palette.loss,
      dash: second ? [6, 3] : [],
      width: second ? 1.8 : 1.4,
    });
  });
}

function drawPins(context, incidents, x, y, bottom, palette, i) {
  for (const { step, outcome } of incidents) {
    vertical(context, x.px(step), y, bottom, i === 0 ? palette.loss : palette.other, [2, 4]);
    mark(context, markOf(outcome).shape, x.px(step), y, 5, palette[colourOf(outcome)]);
  }
}

function showCursor(pair, layers, x, tooltip, i, py) {
  const step = pair[0].step[i];
  const j = nearest(pair[1].step, step, pair[1].length);
  const at = x.px(step);
  vertical(layers.beginCursor(), at, TOP - 6, layers.element.clientHeight - AXIS, colours().ink);
  const there = j >= 0 && Math.abs(pair[1].step[j] - step) <= 1;
  const rows = PANELS.filter(([field]) => field in pair[0]).map(([field, title]) => {
    const [first, second] = [pair[0][field][i], there ? pair[1][field]?.[j] : undefined];
    if (second === undefined) return [title, short(first)];
    return [title, `${short(first)} | ${short(second)} (${ratio(second / first)})`];
  });
  tooltip.show([at, py], `step ${count(step)}`, rows, [
    there ? `${pair[0].run} | ${pair[1].run}` : `${pair[1].run} has no such step`,
  ]);
}
