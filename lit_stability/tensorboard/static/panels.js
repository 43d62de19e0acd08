/**
 * Draws one panel of a chart over attempts or steps: title, axis, lines, points, non-finite values.
 *
 * @typedef {{columns: Columns, indices: [number, number]}} Series  samples, and which are visible
 *
 * @typedef {object} View
 * @property {CanvasRenderingContext2D} context
 * @property {Series} line            samples that are connected
 * @property {Series|null} [faint]    samples between them
 * @property {Series|null} [others]   rejected and undone attempts
 * @property {Series|null} [rival]    samples of another run
 * @property {string} [axis]          field on the x axis: "step" or "attempt"
 * @property {Scale} x
 * @property {[number, number]} edges left and right
 * @property {Record<string, string>} palette
 *
 * @typedef {object} Panel
 * @property {string} title
 * @property {number} height
 * @property {[string, string, number[]?, string?][]} lines  field, colour, dash, name in the title
 * @property {boolean} [switched]  whether its axis may be logarithmic
 */

import { vertical } from "./canvas.js";
import { drawCurve, drawDots, drawFaint, drawNonFinite, drawYAxis, yScale } from "./curve.js";
import { count } from "./scales.js";

const [DOT_SPACING, GUTTER] = [5, 120];

/** Pixels above the curve; with a narrow left margin, the title is there. */
const above = (left) => (left >= GUTTER ? 6 : 16);

/** @param {View} view @param {Panel} panel @param {number} top @param {boolean} log */
export function drawPanel(view, { title, height, lines, switched }, top, log) {
  const { context, palette } = view;
  const [left, right] = view.edges;
  const every = [view.line, view.faint, view.others, view.rival].filter(Boolean);
  const present = lines.filter(([field]) => every.some((each) => isUsed(each, field)));
  const y = yScale(
    every.flatMap(({ columns, indices }) =>
      present.filter(([field]) => columns[field]).map(([field]) => [columns[field], indices])
    ),
    [top + height, top + above(left)],
    log,
  );
  drawTitle(view, title + (switched && log ? " (log)" : ""), present, top + 5);
  if (!y) return;
  context.strokeStyle = palette.line;
  context.strokeRect(left + 0.5, top + height + 0.5, right - left, 0);
  drawYAxis(context, y, left, right, palette);
  context.save();
  context.beginPath();
  context.rect(left, top - 2, right - left, height + 4);
  context.clip();
  drawSeries(view, present, y, top);
  context.restore();
}

const isUsed = ({ columns }, field) => columns[field]?.some(Number.isFinite) ?? false;

function drawSeries(view, lines, y, top) {
  const { context, x, palette, edges, line, faint, others, rival, axis = "step" } = view;
  const [field, colour] = lines[0];
  const isMeasured = field === "loss" || field === "grad_norm"; // others hardly vary from step to step
  const points = [isMeasured && faint, others];
  for (const each of points.filter((series) => series && isUsed(series, field))) {
    const { columns, indices } = each;
    const pen = { colour: each === others ? palette.muted : palette[colour], bad: palette.bad };
    drawFaint(context, columns[axis], columns[field], columns.taken, indices, x, y, pen);
  }
  if (rival && isUsed(rival, field)) {
    const { columns, indices } = rival;
    const pen = { colour: palette.other, dash: [6, 3], width: 1.8 };
    drawCurve(context, columns[axis], columns[field], indices, x, y, pen);
  }
  const { columns, indices } = line;
  for (const [name, ink, dash] of lines.filter(([name]) => columns[name])) {
    drawCurve(context, columns[axis], columns[name], indices, x, y, { colour: palette[ink], dash });
  }
  if ((edges[1] - edges[0]) / (indices[1] - indices[0]) > DOT_SPACING) {
    drawDots(context, columns[axis], columns[field], columns.taken, indices, x, y, {
      line: palette[colour],
      bad: palette.bad,
    });
  }
  if (!isMeasured) return;
  for (const each of [line, faint, others].filter((series) => series?.columns[field])) {
    const at = top + above(edges[0]) + 4;
    drawNonFinite(context, each.columns[axis], each.columns[field], each.indices, x, at, palette.bad);
  }
}

/** Draws the title in the left margin if that is wide, otherwise above the curve. */
function drawTitle({ context, edges, palette }, title, lines, y) {
  const beside = edges[0] >= GUTTER;
  let [at, below] = [beside ? 0 : edges[0] + 4, y];
  context.textAlign = "left";
  context.fillStyle = palette.ink;
  context.fillText(title, at, y);
  at += beside ? 0 : context.measureText(title).width + 18;
  for (const [, colour, dash, name] of lines.filter((line) => line[3])) {
    below += beside ? 16 : 0;
    context.save();
    context.strokeStyle = palette[colour];
    context.setLineDash(dash);
    context.strokeRect(at, below, 22, 0);
    context.restore();
    context.fillStyle = palette.muted;
    context.fillText(name, at + 28, below);
  }
}

/** Draws the labels of the x axis below the last panel. */
export function drawXAxis({ context, x, palette, edges }, bottom, name) {
  context.fillStyle = palette.muted;
  context.textAlign = "center";
  for (const tick of x.ticks.filter(Number.isInteger)) {
    vertical(context, x.px(tick), bottom, bottom + 4, palette.line);
    context.fillText(count(tick), x.px(tick), bottom + 14);
  }
  context.textAlign = edges[0] >= GUTTER ? "left" : "right";
  context.fillText(name, edges[0] >= GUTTER ? 0 : edges[0] - 16, bottom + 14);
}
