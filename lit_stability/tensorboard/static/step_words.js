/** Texts for one sample of a run, used by the time line, the incident and the table. */

import { count, power, ratio, short } from "./scales.js";

const ROWS = [
  ["loss", "loss", short],
  ["grad_norm", "gradient norm", short],
  ["clip_threshold", "clip threshold", short],
  ["learning_rate", "effective LR", short],
  ["lr_factor", "LR factor", ratio],
  ["update_ratio", "update / weight", short],
  ["loss_scale", "loss scale", power],
];
const OFTEN_NAN = new Set(["clip_threshold", "update_ratio", "loss_scale", "lr_factor"]);

/** Returns "attempt 812 · step 799". */
export function stepTitle(columns, i) {
  return `attempt ${count(columns.attempt[i])} · step ${count(columns.step[i])}`;
}

/** @returns {[string, string][]} the values measured at sample `i`; missing ones are omitted. */
export function stepRows(columns, i) {
  const rows = ROWS.filter(([field]) => field in columns)
    .filter(([field]) => !(OFTEN_NAN.has(field) && Number.isNaN(columns[field][i])))
    .map(([field, name, words]) => [name, words(columns[field][i])]);
  const precision = columns.precisions[columns.precision?.[i]];
  return precision === undefined ? rows : [...rows, ["precision", precision]];
}

/** @returns {string[]} notes on the sample, one sentence each. */
export function stepNotes(columns, i, incidents, undoneBy) {
  const attempt = columns.attempt[i];
  const opened = incidents.find((each) => each.attempt === attempt);
  return [
    opened && `Incident ${opened.id}: ${opened.kind}`,
    columns.taken?.[i] === 0 && "Rejected: the update was not applied",
    undoneBy && `Undone by the rollback of incident ${undoneBy.id}`,
  ].filter(Boolean);
}
