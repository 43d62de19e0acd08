/** Texts for one sample of a run, used by the time line, the incident and the table. */

import { count, nearest, power, ratio, short } from "./scales.js";

const ROWS = [
  ["loss", "loss", short],
  ["grad_norm", "gradient norm", short],
  ["clip_threshold", "clip threshold", short],
  ["learning_rate", "applied LR", short],
  ["scheduled_rate", "scheduled LR", short],
  ["lr_factor", "LR factor", ratio],
  ["update_ratio", "update / weight", short],
  ["loss_scale", "loss scale", power],
];
const OFTEN_NAN = new Set(["clip_threshold", "update_ratio", "loss_scale", "lr_factor", "scheduled_rate"]);

/** Returns "step 799 · attempt 812". */
export function stepTitle(columns, i) {
  return `step ${count(columns.step[i])} · attempt ${count(columns.attempt[i])}`;
}

/** Returns a note on another attempt at the same step. */
export function attemptNote(columns, i, notes) {
  const measured = columns.loss ? `loss ${short(columns.loss[i])}` : "";
  return `Attempt ${count(columns.attempt[i])}: ${[...notes, measured].filter(Boolean).join("; ")}`;
}

/**
 * Adds the values of another run at the same step to the rows of a sample.
 *
 * @param {[string, string, number][]} rows  of `stepRows`
 * @param {number} step
 * @param {Other|null} rival
 * @returns {{rows: [string, string][], notes: string[]}}
 */
export function withRival(rows, step, rival) {
  if (!rival) return { rows, notes: [] };
  const { kept } = rival.course;
  const i = kept.length > 0 ? nearest(kept.step, step, kept.length) : -1;
  if (i < 0 || Math.abs(kept.step[i] - step) > 1) {
    return { rows, notes: [`${rival.run} has no such step`] };
  }
  const theirs = new Map(stepRows(kept, i).map(([name, text, value]) => [name, [text, value]]));
  const both = rows.map(([name, text, value]) => {
    const [other, number] = theirs.get(name) ?? [];
    if (other === undefined || (value === undefined && other === text)) return [name, text];
    return [name, `${text} | ${other}${value > 0 && number > 0 ? ` (${ratio(number / value)})` : ""}`];
  });
  return { rows: both, notes: [`after the bar: ${rival.run}`] };
}

/** @returns {[string, string, number][]} the values measured at sample `i`; missing ones are omitted. */
export function stepRows(columns, i) {
  const rows = ROWS.filter(([field]) => field in columns)
    .filter(([field]) => !(OFTEN_NAN.has(field) && Number.isNaN(columns[field][i])))
    .map(([field, name, words]) => [name, words(columns[field][i]), columns[field][i]]);
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
