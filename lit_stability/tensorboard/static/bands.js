/** Quantities that change rarely, drawn as bands: learning-rate factor, loss scale, precision. */

import { power, ratio } from "./scales.js";

/** @typedef {{field: string, title: string, text: (value: number, columns: Columns) => string,
 *   weight: (value: number, all: number[]) => number, quiet: (value: number) => boolean}} Band */

/** @type {Band[]} */
export const BANDS = [
  {
    field: "lr_factor",
    title: "LR factor",
    text: (value) => ratio(value),
    weight: (value) => 0.25 + Math.min(0.7, Math.abs(Math.log2(value)) / 6),
    quiet: (value) => Math.abs(value - 1) < 1e-6,
  },
  {
    field: "loss_scale",
    title: "loss scale",
    text: (value) => power(value),
    weight: (value, all) => spread(Math.log2(value), all.map(Math.log2)),
    quiet: () => false,
  },
  {
    field: "precision",
    title: "precision",
    text: (value, columns) => columns.precisions[value] ?? `#${value}`,
    weight: (value, all) => spread(value, all),
    quiet: () => false,
  },
];

const spread = (value, all) => {
  const low = Math.min(...all);
  const high = Math.max(...all);
  return high > low ? 0.2 + (0.6 * (value - low)) / (high - low) : 0.2;
};

/** Stretches of equal text as [{value, text, from, to}], by index; NaN and Inf are omitted. */
function stretches(band, columns, [from, to]) {
  const values = columns[band.field];
  const found = [];
  let last = null;
  for (let i = from; i < to; i++) {
    if (!Number.isFinite(values[i])) continue;
    const text = last?.value === values[i] ? last.text : band.text(values[i], columns);
    if (last?.text === text && last.to === i) last.to = i + 1;
    else found.push(last = { value: values[i], text, from: i, to: i + 1 });
  }
  return found;
}

/** Draws a band between `top` and `top + height`. */
export function drawBand(context, band, columns, indices, x, [left, right], top, height, colours) {
  const found = stretches(band, columns, indices);
  const all = [...new Set(found.map((each) => each.value))].filter((value) =>
    value > 0 || band.field === "precision"
  );
  context.save();
  context.beginPath();
  context.rect(left, top, right - left, height);
  context.clip();
  for (const each of found) {
    drawStretch(context, band, columns, each, all, x, [left, right], top, height, colours);
  }
  context.restore();
}

function drawStretch(
  context,
  band,
  columns,
  { value, text, from, to },
  all,
  x,
  [left, right],
  top,
  height,
  colours,
) {
  const start = Math.max(left, x.px(columns.step[from]));
  const end = Math.min(
    right,
    x.px(to < columns.length ? columns.step[to] : columns.step[to - 1] + 1),
  );
  const width = Math.max(end - start, 1.5);
  if (band.quiet(value)) return;
  const weight = value === 0 && band.field === "loss_scale" ? 0.9 : band.weight(value, all);
  context.globalAlpha = weight;
  context.fillStyle = colours.band;
  context.fillRect(start, top, width, height);
  context.globalAlpha = 1;
  context.fillStyle = colours.page;
  context.fillRect(start - 0.5, top, 1, height);
  label(context, text, start, width, top + height / 2, weight, colours);
}

function label(context, text, start, width, y, weight, colours) {
  if (context.measureText(text).width + 8 > width) return;
  context.fillStyle = weight > 0.55 ? colours.page : colours.ink;
  context.textAlign = "left";
  context.fillText(text, start + 4, y);
}
