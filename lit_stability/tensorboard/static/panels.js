/**
 * Draws one panel of a chart over attempts or steps: title, axis, lines, dots, non-finite values.
 *
 * @typedef {object} View
 * @property {CanvasRenderingContext2D} context
 * @property {Columns} steps
 * @property {Float64Array} xs        values of the x axis: attempts or steps
 * @property {Scale} x
 * @property {[number, number]} edges left and right
 * @property {[number, number]} indices
 * @property {Record<string, string>} palette
 *
 * @typedef {object} Panel
 * @property {string} title
 * @property {number} height
 * @property {[string, string, number[]?, string?][]} lines  field, colour, dash, name in the title
 * @property {boolean} [switched]  whether its axis may be logarithmic
 */

import { vertical } from "./canvas.js";
import { drawCurve, drawDots, drawNonFinite, drawYAxis, yScale } from "./curve.js";
import { count } from "./scales.js";

const [DOT_SPACING, GUTTER] = [5, 120];

/** Pixels above the curve; with a narrow left margin, the title is there. */
const above = (left) => (left >= GUTTER ? 6 : 16);

/** @param {View} view @param {Panel} panel @param {number} top @param {boolean} log */
export function drawPanel(view, { title, height, lines, switched }, top, log) {
  const { context, steps, palette, indices } = view;
  const [left, right] = view.edges;
  const present = lines.filter(([field]) => steps[field]?.some(Number.isFinite));
  const y = yScale(present.map(([field]) => steps[field]), indices, [
    top + height,
    top + above(left),
  ], log);
  drawTitle(view, title + (switched && log ? " (log)" : ""), present, top + 5);
  if (!y) return;
  context.strokeStyle = palette.line;
  context.strokeRect(left + 0.5, top + height + 0.5, right - left, 0);
  drawYAxis(context, y, left, right, palette);
  context.save();
  context.beginPath();
  context.rect(left, top - 2, right - left, height + 4);
  context.clip();
  drawLines(view, present, y, top);
  context.restore();
}

function drawLines({ context, steps, xs, x, palette, edges, indices }, lines, y, top) {
  for (const [field, colour, dash] of lines) {
    drawCurve(context, xs, steps[field], indices, x, y, { colour: palette[colour], dash });
  }
  const [field, colour] = lines[0];
  if ((edges[1] - edges[0]) / (indices[1] - indices[0]) > DOT_SPACING) {
    drawDots(context, xs, steps[field], steps.taken, indices, x, y, {
      line: palette[colour],
      bad: palette.bad,
    });
  }
  if (field === "loss" || field === "grad_norm") {
    drawNonFinite(context, xs, steps[field], indices, x, top + above(edges[0]) + 4, palette.bad);
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
