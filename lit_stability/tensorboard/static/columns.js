/**
 * Converts rows of steps to one array per field. Makes no requests and draws nothing.
 *
 * @typedef {Record<string, Float64Array> & {length: number, precisions: string[]}} Columns
 *   All arrays have the same length, and are sorted by `attempt`.
 */

const SPECIAL = { nan: NaN, inf: Infinity, "-inf": -Infinity };

/** Converts a number from JSON, in which NaN and Inf are strings. */
export function number(value) {
  if (typeof value === "number") return value;
  return SPECIAL[value] ?? NaN;
}

/** @returns {Columns} */
export function toColumns(fields, rows, precisions = []) {
  const columns = { length: rows.length, precisions };
  fields.forEach((field, j) => {
    const column = new Float64Array(rows.length);
    for (let i = 0; i < rows.length; i++) column[i] = number(rows[i][j]);
    columns[field] = column;
  });
  return columns;
}

/** Returns the samples of one optimizer; all samples if the optimizer was not recorded. */
export function ofOptimizer(columns, optimizer) {
  const whose = columns.optimizer;
  if (!whose || whose.every((each) => each === optimizer)) return columns;
  return samplesAt(columns, Array.from(whose.keys()).filter((i) => whose[i] === optimizer));
}

/**
 * Merges the samples of a run with all attempts around its incidents.
 *
 * Long runs are sampled, the attempts around incidents are not. Without the merge, a fault of one
 * step would be drawn as wide as the distance between two samples.
 *
 * @param {Columns} steps
 * @param {Columns[]} windows
 * @returns {Columns} each attempt once; `dense` is 1 where only a window has it
 */
export function mergeColumns(steps, windows) {
  const found = new Map();
  for (const source of [...windows, steps]) {
    for (let i = 0; i < source.length; i++) found.set(source.attempt[i], [source, i]);
  }
  if (found.size === steps.length) return steps;
  const order = [...found.keys()].sort((a, b) => a - b).map((attempt) => found.get(attempt));
  const merged = { length: order.length, precisions: steps.precisions };
  merged.dense = Float64Array.from(order, ([source]) => Number(source !== steps));
  for (const field of fieldsOf(steps)) {
    merged[field] = Float64Array.from(order, ([source, i]) => source[field]?.[i] ?? NaN);
  }
  return merged;
}

/** Returns the samples at some indices, in that order. @returns {Columns} */
export function samplesAt(columns, indices) {
  const found = { length: indices.length, precisions: columns.precisions };
  for (const field of fieldsOf(columns)) {
    found[field] = Float64Array.from(indices, (i) => columns[field][i]);
  }
  return found;
}

/** Returns the names of the fields. */
const fieldsOf = (columns) =>
  Object.keys(columns).filter((name) => columns[name] instanceof Float64Array);
