/** Converts values to pixels and to texts. Draws nothing. */

/**
 * @typedef {object} Scale
 * @property {(value: number) => number} px  pixel of a value, also outside of the axis
 * @property {(px: number) => number} value  value of a pixel
 * @property {number[]} ticks                round values to label
 */

/** @returns {Scale} linear, from `low` at pixel `from` to `high` at pixel `to`. */
export function linearScale([low, high], [from, to], count = 4) {
  const span = high - low || 1;
  return {
    px: (value) => from + ((value - low) / span) * (to - from),
    value: (px) => low + ((px - from) / (to - from)) * span,
    ticks: linearTicks(low, high, count),
  };
}

/** @returns {Scale} logarithmic; values that are not positive are at the bottom. */
export function logScale([low, high], pixels, count = 4) {
  const inner = linearScale([Math.log10(low), Math.log10(high)], pixels);
  return {
    px: (value) => (value > 0 ? inner.px(Math.log10(value)) : pixels[0]),
    value: (px) => 10 ** inner.value(px),
    ticks: logTicks(low, high, count),
  };
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((each) => each * power >= rough) ?? 10);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.5) return linearTicks(low, high, count).filter((tick) => tick > 0);
  const every = Math.max(1, Math.floor(decades / count));
  const steps = decades < 1.5 ? [1, 2, 5] : decades < 2.2 ? [1, 3] : [1];
  const ticks = [];
  for (let p = Math.floor(Math.log10(low)); 10 ** p <= high; p += every) {
    ticks.push(
      ...steps.map((step) => step * 10 ** p).filter((tick) => tick >= low && tick <= high),
    );
  }
  return ticks;
}

/** Returns the index of the first element that is not below `value`, in an ascending array. */
export function lowerBound(array, value, length = array.length) {
  let low = 0;
  let high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (array[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Returns the index of the element nearest to `value`; -1 if the array is empty. */
export function nearest(array, value, length = array.length) {
  const after = Math.min(lowerBound(array, value, length), length - 1);
  if (after <= 0) return length > 0 ? 0 : -1;
  return value - array[after - 1] < array[after] - value ? after - 1 : after;
}

/** Formats a measurement in few characters: 0.00312, 12.4, 1.2e+7, NaN, ∞. */
export function short(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) {
    return value.toExponential(2).replace(/\.?0+e/, "e");
  }
  return String(Number(value.toPrecision(4)));
}

/** Formats a count with thousands separators: 12,431. */
export const count = (value) => Math.round(value).toLocaleString("en-US");

/** Formats a ratio: ×24, ÷130. */
export function ratio(value) {
  if (!Number.isFinite(value) || value <= 0) return short(value);
  return value >= 1 ? `×${Number(value.toPrecision(3))}` : `÷${Number((1 / value).toPrecision(3))}`;
}

/** Formats a power of two as 2^n; other numbers as they are. */
export function power(value) {
  const exponent = Math.log2(value);
  return Number.isInteger(exponent) && Math.abs(exponent) >= 4 ? `2^${exponent}` : short(value);
}

/** Returns "1 incident", "3 incidents". */
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
