/**
 * Encodes gradient norms relative to the rolling median of their layer, in one byte each.
 *
 * The median is over the samples around, at every zoom level the same, so that a colour means the same
 * wherever one zooms. A spike differs from its neighbours; a slow drift over the run does not.
 *
 * A byte holds the logarithm of the ratio: 100 is the median, 0 is a thousandth of it or less, 200 is
 * a thousand times the median or more. Draws nothing.
 */

export const [MEDIAN, TOP_CODE, NON_FINITE, ZERO, NOTHING] = [100, 200, 255, 254, 253];
const DECADES = 3;
const PER_DECADE = MEDIAN / DECADES;
/** Samples of a rolling median: at least this many, and at least this share of all. */
const [FEWEST, SHARE] = [25, 1 / 6];

/**
 * @typedef {object} Coded
 * @property {Uint8Array} codes  row-major, [layers, samples]
 * @property {number} samples
 * @property {Float64Array} medians  common logarithms, row-major, [layers, knots]
 * @property {number} every  samples between two knots, between which medians are interpolated
 */

/** @param {Layers} layers @returns {Coded} */
export function encode({ names, values }) {
  const layers = names.length;
  const samples = layers === 0 ? 0 : Math.floor(values.length / layers);
  const window = Math.max(FEWEST, Math.ceil(samples * SHARE));
  const every = window >> 1;
  const knots = Math.ceil(samples / every) + 1;
  const medians = new Float64Array(layers * knots);
  const coded = { codes: new Uint8Array(layers * samples), samples, medians, every };
  const bits = new Uint32Array(samples);
  const asFloats = new Float32Array(bits.buffer);
  for (let layer = 0; layer < layers; layer++) {
    for (let i = 0; i < samples; i++) asFloats[i] = values[i * layers + layer];
    const own = medians.subarray(layer * knots, (layer + 1) * knots);
    rollingMedians(asFloats, every, own);
    encodeLayer(bits, own, every, coded.codes.subarray(layer * samples, (layer + 1) * samples));
  }
  return coded;
}

/** Returns the rolling median of a layer at a sample. */
export function medianAt({ medians, every, samples }, layer, i) {
  const knots = Math.ceil(samples / every) + 1;
  const [knot, rest] = [Math.floor(i / every), (i % every) / every];
  const [before, after] = [medians[layer * knots + knot], medians[layer * knots + knot + 1]];
  return 10 ** (before + (after - before) * rest);
}

/** Sets the logarithm of the median around every knot; where all is zero, that of the knot before. */
function rollingMedians(values, every, medians) {
  const width = 2 * every + 1;
  for (let knot = 0; knot < medians.length; knot++) {
    const start = Math.max(0, Math.min((knot - 1) * every, values.length - width));
    const found = medianOf(values.slice(start, start + width));
    medians[knot] = found > 0 ? Math.log10(found) : (medians[knot - 1] ?? 0);
  }
}

function encodeLayer(bits, medians, every, codes) {
  for (let knot = 0, i = 0; i < bits.length; knot++) {
    const rise = ((medians[knot + 1] - medians[knot]) / every) * PER_DECADE;
    let shift = MEDIAN + 0.5 - medians[knot] * PER_DECADE;
    for (const end = Math.min(bits.length, (knot + 1) * every); i < end; i++, shift -= rise) {
      const scaled = SCALED_LOG[bits[i] >>> 16] + shift;
      if (bits[i] << 1 === 0) codes[i] = ZERO;
      else if (scaled !== scaled) codes[i] = NON_FINITE;
      else codes[i] = scaled < 0 ? 0 : scaled > TOP_CODE ? TOP_CODE : scaled;
    }
  }
}

/**
 * Returns how unusual each layer is: the mean distance of its samples from the median, where it is
 * more than a factor of three; NaN and Inf count as a factor of a thousand.
 *
 * @param {Coded} coded  @param {number} layers
 */
export function unusualness({ codes, samples }, layers) {
  const scores = new Float64Array(layers);
  for (let layer = 0; layer < layers; layer++) {
    for (let i = layer * samples; i < (layer + 1) * samples; i++) scores[layer] += EXCESS[codes[i]];
    scores[layer] /= Math.max(1, samples);
  }
  return scores;
}

const EXCESS = Float64Array.from({ length: 256 }, (_, code) => {
  if (code === NON_FINITE) return MEDIAN;
  return code > TOP_CODE ? 0 : Math.max(0, Math.abs(code - MEDIAN) - PER_DECADE / 2);
});

/**
 * A table of codes by the upper half of a float32: sign, exponent and seven bits of the mantissa.
 *
 * Accurate to a tenth of a code, and much faster than a logarithm per value. NaN for NaN and Inf.
 */
const SCALED_LOG = scaledLogs();

function scaledLogs() {
  const upper = new Uint32Array(1);
  const value = new Float32Array(upper.buffer);
  return Float32Array.from({ length: 1 << 16 }, (_, half) => {
    upper[0] = (half << 16) | 0x8000;
    return Number.isFinite(value[0]) ? Math.log10(Math.abs(value[0])) * PER_DECADE : NaN;
  });
}

/** Returns the median of the finite values that are not zero, 0 if there are none. Sorts in place. */
function medianOf(values) {
  let kept = 0;
  for (let i = 0; i < values.length; i++) {
    const value = Math.abs(values[i]);
    if (value > 0 && value < Infinity) values[kept++] = value;
  }
  return kept === 0 ? 0 : select(values, kept >> 1, kept - 1);
}

/** Returns the k-th smallest value up to index `high`. Reorders the array (Hoare's quickselect). */
function select(values, k, high) {
  let low = 0;
  while (low < high) {
    const pivot = values[(low + high) >> 1];
    let [i, j] = [low, high];
    while (i <= j) {
      while (values[i] < pivot) i += 1;
      while (values[j] > pivot) j -= 1;
      if (i > j) break;
      const swapped = values[i];
      values[i++] = values[j];
      values[j--] = swapped;
    }
    if (k <= j) high = j;
    else if (k >= i) low = i;
    else break;
  }
  return values[k];
}

/**
 * Returns the most extreme code of several layers in each pixel column.
 *
 * Non-finite values come first, then zeros, then the ratio that is farthest from the median. So a
 * single bad sample among thousands is visible.
 *
 * @param {Coded} coded
 * @param {number[]} layers
 * @param {Int32Array} edges  first sample of each column, and the end of the last one
 * @returns {Uint8Array} a code per column, NOTHING if it has no sample
 */
export function mostStriking({ codes, samples }, layers, edges) {
  const columns = new Uint8Array(edges.length - 1).fill(NOTHING);
  for (const layer of layers) {
    const base = layer * samples;
    for (let c = 0; c < columns.length; c++) {
      let found = columns[c];
      for (let i = edges[c]; i < edges[c + 1]; i++) {
        if (SEVERITY[codes[base + i]] > SEVERITY[found]) found = codes[base + i];
      }
      columns[c] = found;
    }
  }
  return columns;
}

const SEVERITY = Uint8Array.from({ length: 256 }, (_, code) => {
  if (code > TOP_CODE) return { [NON_FINITE]: 255, [ZERO]: 254 }[code] ?? 0;
  return 1 + Math.abs(code - MEDIAN) * 2 + (code > MEDIAN ? 1 : 0);
});

/** Returns the rank of a code; at equal distance, above the median ranks higher. NOTHING is last. */
export const severityOf = (code) => SEVERITY[code];
