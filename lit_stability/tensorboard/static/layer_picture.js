/** Draws the pixels of the heat map from the codes of layers and steps. */

import { MEDIAN, mostStriking, NON_FINITE, NOTHING, TOP_CODE, ZERO } from "./layer_codes.js";
import { lowerBound } from "./scales.js";
import { channels } from "./theme.js";

/**
 * Assigns samples to the cells of the x axis, and cells to pixels.
 *
 * Zoomed out, a cell is one pixel with many samples; zoomed in, it is one sample with many pixels.
 *
 * @param {Float64Array} attempts  @param {Scale} x
 * @param {[number, number]} pixels  left and right
 * @returns {{edges: Int32Array, cellOf: Int32Array}} first sample of each cell, and the end of the
 *   last one; the cell of each pixel, -1 for none
 */
export function cells(attempts, x, [left, right]) {
  const width = Math.max(1, Math.round(right - left));
  const from = lowerBound(attempts, x.value(left));
  const to = Math.max(from, Math.min(attempts.length, lowerBound(attempts, x.value(right)) + 1));
  return to - from > width
    ? pixelCells(attempts, x, left, width)
    : sampleCells(attempts, x, left, width, from, to);
}

function pixelCells(attempts, x, left, width) {
  const edges = Int32Array.from(
    { length: width + 1 },
    (_, i) => lowerBound(attempts, x.value(left + i)),
  );
  edges[width] = Math.min(attempts.length, edges[width] + 1);
  return { edges, cellOf: Int32Array.from({ length: width }, (_, i) => i) };
}

function sampleCells(attempts, x, left, width, from, to) {
  const first = Math.max(0, from - 1);
  const last = Math.min(attempts.length, to + 1);
  const edges = Int32Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const cellOf = new Int32Array(width).fill(-1);
  for (let i = first; i < last; i++) {
    const start = x.value(left) >= attempts[i] ? left : x.px(border(attempts, i - 1));
    const end = i + 1 < attempts.length ? x.px(border(attempts, i)) : left + width;
    cellOf.fill(
      i - first,
      Math.max(0, Math.round(start - left)),
      Math.min(width, Math.round(end - left)),
    );
  }
  return { edges, cellOf };
}

/**
 * Returns where sample `i` ends and the next begins: halfway, if the samples are regular.
 *
 * An extra sample between two regular ones, such as a rejected attempt, is one attempt wide.
 * Otherwise a fault of one step would cover the healthy steps up to the next sample.
 */
function border(attempts, i) {
  if (i < 0) return attempts[0] - 0.5;
  const [before, after] = [reach(attempts, i), reach(attempts, i + 1)];
  return attempts[i] + ((attempts[i + 1] - attempts[i]) * before) / (before + after);
}

const reach = (attempts, i) =>
  Math.min(attempts[i] - (attempts[i - 1] ?? -Infinity), (attempts[i + 1] ?? Infinity) - attempts[i]);

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
