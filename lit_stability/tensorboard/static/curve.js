/** Draws a series as a line with at most four points per pixel column, so that no spike is lost. */

import { linearScale, logScale, lowerBound, short } from "./scales.js";
import { mark } from "./canvas.js";

/** Target distance between two labels of a y axis, in pixels; the minimum is about half of it. */
const TICK = 36;

/** Returns the indices of the visible samples and one more on each side: [from, to). */
export function slice(xs, [low, high], length = xs.length) {
  const from = Math.max(0, lowerBound(xs, low, length) - 1);
  return [from, Math.min(length, lowerBound(xs, high, length) + 2)];
}

/**
 * Returns a y axis that contains all visible finite values of several series; null if none.
 *
 * @param {[Float64Array, [number, number]][]} series  values, and which of them are visible
 * @param {[number, number]} pixels  bottom and top
 * @param {boolean} log
 */
export function yScale(series, pixels, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const [values, [from, to]] of series) {
    for (let i = from; i < to; i++) {
      const value = values[i];
      if (!Number.isFinite(value) || (log && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return null;
  const ticks = Math.max(2, Math.abs(pixels[0] - pixels[1]) / TICK);
  return log ? logScale([low / 1.15, high * 1.15], pixels, ticks) : padded(low, high, pixels);
}

function padded(low, high, pixels) {
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return linearScale([low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad], pixels, 3);
}

/**
 * Draws a series; the line is interrupted where a value is not finite.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {Float64Array} xs  @param {Float64Array} ys
 * @param {[number, number]} indices
 * @param {Scale} x  @param {Scale} y
 * @param {{colour: string, dash?: number[], width?: number}} pen
 */
export function drawCurve(context, xs, ys, [from, to], x, y, pen) {
  context.save();
  Object.assign(context, {
    strokeStyle: pen.colour,
    lineWidth: pen.width ?? 1.4,
    lineJoin: "round",
  });
  context.setLineDash(pen.dash ?? []);
  context.beginPath();
  trace(context, xs, ys, from, to, x, y);
  context.stroke();
  context.restore();
}

function trace(context, xs, ys, from, to, x, y) {
  let pen = false;
  for (let i = from; i < to;) {
    if (!Number.isFinite(ys[i])) {
      pen = false;
      i += 1;
      continue;
    }
    const column = Math.round(x.px(xs[i]));
    const bin = columnFrom(xs, ys, i, to, x, column);
    const at = bin.count === 1 ? x.px(xs[i]) : column;
    for (const value of bin.count === 1 ? [ys[i]] : [bin.first, bin.low, bin.high, bin.last]) {
      if (pen) context.lineTo(at, y.px(value));
      else context.moveTo(at, y.px(value));
      pen = true;
    }
    if (bin.count === 1 && !Number.isFinite(ys[i + 1]) && !Number.isFinite(ys[i - 1])) {
      context.lineTo(at + 1.5, y.px(ys[i])); // a single point between two gaps
    }
    i = bin.end;
  }
}

/** Returns the first, last, lowest and highest finite value in one pixel column. */
function columnFrom(xs, ys, start, to, x, column) {
  const bin = {
    first: ys[start],
    last: ys[start],
    low: ys[start],
    high: ys[start],
    count: 0,
    end: start,
  };
  while (bin.end < to && Number.isFinite(ys[bin.end]) && Math.round(x.px(xs[bin.end])) === column) {
    const value = ys[bin.end];
    if (value < bin.low) bin.low = value;
    if (value > bin.high) bin.high = value;
    bin.last = value;
    bin.count += 1;
    bin.end += 1;
  }
  return bin;
}

/** Draws a dot at each sample; a hollow one at rejected attempts. */
export function drawDots(context, xs, ys, taken, [from, to], x, y, colours) {
  for (let i = from; i < to; i++) {
    if (!Number.isFinite(ys[i])) continue;
    const rejected = taken && taken[i] === 0;
    mark(
      context,
      rejected ? "ring" : "circle",
      x.px(xs[i]),
      y.px(ys[i]),
      rejected ? 4 : 2.2,
      rejected ? colours.bad : colours.line,
    );
  }
}

/** Draws a faint point at each sample, and a ring at rejected attempts. */
export function drawFaint(context, xs, ys, taken, [from, to], x, y, { colour, bad }) {
  context.save();
  context.globalAlpha = 0.45;
  for (let i = from; i < to; i++) {
    if (!Number.isFinite(ys[i])) continue;
    const rejected = taken && taken[i] === 0;
    if (rejected) mark(context, "ring", x.px(xs[i]), y.px(ys[i]), 3, bad);
    else mark(context, "circle", x.px(xs[i]), y.px(ys[i]), 1.4, colour);
  }
  context.restore();
}

/** Draws a cross at the top of the chart for each NaN or Inf, which has no height. */
export function drawNonFinite(context, xs, ys, [from, to], x, top, colour) {
  context.save();
  Object.assign(context, { strokeStyle: colour, lineWidth: 2 });
  let last = -Infinity;
  for (let i = from; i < to; i++) {
    const at = x.px(xs[i]);
    if (Number.isFinite(ys[i]) || at - last < 3) continue;
    last = at;
    context.beginPath();
    for (const side of [-1, 1]) {
      context.moveTo(at - 4, top - 4 * side);
      context.lineTo(at + 4, top + 4 * side);
    }
    context.stroke();
  }
  context.restore();
}

/** Draws the grid lines of a y axis, and its labels left of `left`. */
export function drawYAxis(context, y, left, right, colours) {
  context.save();
  context.textAlign = "right";
  for (const tick of y.ticks) {
    const at = Math.round(y.px(tick)) + 0.5;
    context.strokeStyle = colours.line;
    context.globalAlpha = 0.6;
    context.strokeRect(left, at, right - left, 0);
    context.globalAlpha = 1;
    context.fillStyle = colours.muted;
    context.fillText(short(tick), left - 6, at);
  }
  context.restore();
}
