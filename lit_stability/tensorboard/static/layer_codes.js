/**
 * Gradient norms as what they are to each layer's own median, a byte each.
 *
 * A byte holds the logarithm of the ratio: 100 is the median itself, 0 a thousandth of it or less, 200
 * a thousand times or more. Arrays in, arrays out: no drawing.
 */

export const [MEDIAN, TOP_CODE, NON_FINITE, ZERO, NOTHING] = [100, 200, 255, 254, 253];
const DECADES = 3;
const PER_DECADE = MEDIAN / DECADES;

/** @typedef {{codes: Uint8Array, medians: Float64Array, samples: number}} Coded
 *   `codes` is layer by layer: [layers, samples]. */

/** @param {Layers} layers @returns {Coded} */
export function encode({ names, values }) {
  const layers = names.length;
  const samples = layers === 0 ? 0 : Math.floor(values.length / layers);
  const coded = { codes: new Uint8Array(layers * samples), medians: new Float64Array(layers), samples };
  const column = new Float32Array(samples);
  for (let layer = 0; layer < layers; layer++) {
    for (let i = 0; i < samples; i++) column[i] = values[i * layers + layer];
    coded.medians[layer] = medianOf(column);
    encodeLayer(column, coded.medians[layer], coded.codes.subarray(layer * samples, (layer + 1) * samples));
  }
  return coded;
}

function encodeLayer(column, median, codes) {
  const shift = Math.log10(median);
  for (let i = 0; i < column.length; i++) {
    const value = column[i];
    if (value === 0) codes[i] = ZERO;
    else if (!Number.isFinite(value)) codes[i] = NON_FINITE;
    else codes[i] = Math.min(TOP_CODE, Math.max(0, MEDIAN + (Math.log10(Math.abs(value)) - shift) * PER_DECADE + 0.5));
  }
}

/** Median of what is finite and not zero, 1 where nothing is. */
export function medianOf(values) {
  const kept = values.filter((value) => Number.isFinite(value) && value !== 0);
  if (kept.length === 0) return 1;
  return Math.abs(select(kept, kept.length >> 1));
}

/** The k-th smallest; the array is reordered (Hoare's quickselect). */
function select(values, k) {
  let [low, high] = [0, values.length - 1];
  while (low < high) {
    const pivot = values[(low + high) >> 1];
    let [i, j] = [low, high];
    while (i <= j) {
      while (values[i] < pivot) i += 1;
      while (values[j] > pivot) j -= 1;
      if (i > j) break;
      [values[i], values[j]] = [values[j], values[i]];
      i += 1;
      j -= 1;
    }
    if (k <= j) high = j;
    else if (k >= i) low = i;
    else break;
  }
  return values[k];
}

/**
 * The most striking code of each pixel column, over some layers.
 *
 * Non-finite beats zero, zero beats any ratio, and the ratio farthest from the median beats the rest:
 * a single bad sample among thousands stays visible.
 *
 * @param {Coded} coded
 * @param {number[]} layers
 * @param {Int32Array} edges  first sample of each column, and one more at the end
 * @returns {Uint8Array} a code per column, NOTHING where it has no sample
 */
export function mostStriking({ codes, samples }, layers, edges) {
  const columns = new Uint8Array(edges.length - 1).fill(NOTHING);
  for (const layer of layers) {
    const base = layer * samples;
    for (let c = 0; c < columns.length; c++) {
      let found = columns[c];
      for (let i = edges[c]; i < edges[c + 1]; i++) {
        if (STRIKE[codes[base + i]] > STRIKE[found]) found = codes[base + i];
      }
      columns[c] = found;
    }
  }
  return columns;
}

const STRIKE = Uint8Array.from({ length: 256 }, (_, code) => {
  if (code > TOP_CODE) return { [NON_FINITE]: 255, [ZERO]: 254 }[code] ?? 0;
  return 1 + Math.abs(code - MEDIAN) * 2 + (code > MEDIAN ? 1 : 0);
});

/** How striking a code is; above wins over as far below, NOTHING loses to all. */
export const strikeOf = (code) => STRIKE[code];
