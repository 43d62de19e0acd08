/** Draws the pixels of the heat map from the codes of layers and steps. */

import { MEDIAN, mostStriking, NON_FINITE, NOTHING, TOP_CODE, ZERO } from "./layer_codes.js";
import { lowerBound } from "./scales.js";
import { channels } from "./theme.js";

/**
 * Assigns samples to the cells of the x axis, and cells to pixels.
 *
 * Zoomed out, a cell is one pixel with many samples; zoomed in, it is one step with many pixels.
 *
 * @param {Float64Array} steps  ascending; attempts at the same step share a cell
 * @param {Scale} x
 * @param {[number, number]} pixels  left and right
 * @returns {{edges: Int32Array, cellOf: Int32Array}} first sample of each cell, and the end of the
 *   last one; the cell of each pixel, -1 for none
 */
export function cells(steps, x, [left, right]) {
  const width = Math.max(1, Math.round(right - left));
  const from = lowerBound(steps, x.value(left));
  const to = Math.max(from, Math.min(steps.length, lowerBound(steps, x.value(right)) + 1));
  return to - from > width
    ? pixelCells(steps, x, left, width)
    : stepCells(steps, x, left, width, from, to);
}

function pixelCells(steps, x, left, width) {
  const edges = Int32Array.from(
    { length: width + 1 },
    (_, i) => lowerBound(steps, x.value(left + i)),
  );
  edges[width] = lowerBound(steps, (steps[edges[width]] ?? Infinity) + 0.5);
  return { edges, cellOf: Int32Array.from({ length: width }, (_, i) => i) };
}

function stepCells(steps, x, left, width, from, to) {
  const firsts = firstOfEach(steps, Math.max(0, from - 2), Math.min(steps.length, to + 2));
  const at = Float64Array.from(firsts, (i) => steps[i]);
  const cellOf = new Int32Array(width).fill(-1);
  const narrow = [];
  for (let i = 0; i < at.length; i++) {
    const start = x.value(left) >= at[i] ? left : x.px(border(at, i - 1));
    const isLast = i + 1 === at.length && firsts.end === steps.length;
    const end = isLast ? left + width : x.px(border(at, i));
    const [first, after] = [Math.round(start - left), Math.round(end - left)];
    if (first === after && first >= 0 && first < width) narrow.push([first, i]);
    cellOf.fill(i, Math.max(0, first), Math.max(0, Math.min(width, after)));
  }
  // A step that is narrower than a pixel takes one from its neighbours, or it could not be seen.
  for (const [pixel, i] of narrow) cellOf[pixel] = i;
  return { edges: Int32Array.from([...firsts, firsts.end]), cellOf };
}

/** Returns the index of the first sample of each step in a range that is extended to whole steps. */
function firstOfEach(steps, from, to) {
  const firsts = [];
  let i = from < steps.length ? lowerBound(steps, steps[from]) : from;
  for (; i < to; i = lowerBound(steps, steps[i] + 0.5)) firsts.push(i);
  return Object.assign(firsts, { end: i });
}

/**
 * Returns where the cell of step `i` ends and the next begins: halfway, if the steps are regular.
 *
 * An extra step between two regular ones, such as a rejected one, is one step wide. Otherwise a fault
 * of one step would cover the healthy steps up to the next sample.
 */
function border(at, i) {
  if (i < 0) return at[0] - 0.5;
  if (i + 1 >= at.length) return at[i] + 0.5;
  const [before, after] = [reach(at, i), reach(at, i + 1)];
  return at[i] + ((at[i + 1] - at[i]) * before) / (before + after);
}

const reach = (at, i) =>
  Math.min(at[i] - (at[i - 1] ?? -Infinity), (at[i + 1] ?? Infinity) - at[i]);

/**
 * Draws all rows.
 *
 * @param {Coded} coded
 * @param {object[]} rows  of `layOut`
 * @param {{edges: Int32Array, cellOf: Int32Array}} across
 * @param {[number, number]} size  width and height in pixels
 * @param {Record<string, string>} palette
 * @returns {{canvas: HTMLCanvasElement, extremes: Uint8Array}} the picture; for each column of pixels
 *   255 if any layer was non-finite, 254 if any was zero
 */
export function paint(coded, rows, { edges, cellOf }, [width, height], palette) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const table = colourTable(palette);
  const extremes = new Uint8Array(width);
  for (const row of rows) {
    const found = mostStriking(coded, row.layers, edges);
    const line = widen(cellOf.map((cell) => (cell < 0 ? NOTHING : found[cell])));
    for (let c = 0; c < width; c++) if (line[c] >= ZERO && line[c] > extremes[c]) extremes[c] = line[c];
    fillRow(pixels, width, row, line, table);
  }
  context.putImageData(image, 0, 0);
  return { canvas, extremes };
}

/** Makes non-finite pixels three wide, so that one step among thousands is visible. */
function widen(line) {
  const wide = Uint8Array.from(line);
  for (let c = 0; c < line.length; c++) {
    if (line[c] !== NON_FINITE) continue;
    if (c > 0) wide[c - 1] = NON_FINITE;
    if (c + 1 < line.length) wide[c + 1] = NON_FINITE;
  }
  return wide;
}

function fillRow(pixels, width, { top, height }, line, table) {
  const start = Math.round(top);
  const end = Math.max(start + 1, Math.round(top + height) - (height >= 8 ? 1 : 0));
  for (let y = start; y < end; y++) {
    for (let c = 0; c < width; c++) {
      const code = line[c];
      pixels[y * width + c] = code === ZERO && (c + y) % 4 === 0 ? table.ink : table.colours[code];
    }
  }
}

/** @returns {{colours: Uint32Array, ink: number}} a packed colour for each code. */
function colourTable(palette) {
  const colours = new Uint32Array(256);
  for (let code = 0; code <= TOP_CODE; code++) {
    const end = channels(code < MEDIAN ? palette.below : palette.above);
    colours[code] = pack(mix(channels(palette.middle), end, Math.abs(code - MEDIAN) / MEDIAN));
  }
  colours[ZERO] = pack(channels(palette.page));
  colours[NON_FINITE] = pack(channels(palette.bad));
  return { colours, ink: pack(channels(palette.ink)) };
}

function mix(from, to, share) {
  return from.map((channel, i) => Math.round(channel + (to[i] - channel) * share));
}

const pack = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
