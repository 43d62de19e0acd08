/**
 * Places the attempts of a run on an axis of steps. Makes no requests and draws nothing.
 *
 * An attempt is one try of an optimizer step. The attempts that count are neither rejected nor undone
 * by a rollback; there is at most one for each step. The others are kept next to them.
 *
 * @typedef {object} Course
 * @property {Columns} kept    the attempts that count, ascending by step
 * @property {Columns} regular  of these, the ones that are recorded at regular intervals
 * @property {Columns} dense   of these, the ones that are recorded only around an incident
 * @property {Columns} others  rejected and undone ones, ascending by step
 * @property {Float64Array} at  all steps that have an attempt, ascending
 * @property {{incident: object, from: number, to: number}[]} loops  what rollbacks undid, in steps
 */

import { samplesAt } from "./columns.js";
import { lowerBound, nearest } from "./scales.js";

/**
 * @param {Columns} steps  all attempts, ascending by attempt
 * @param {object[]} incidents  whose `spans` are the attempts that rollbacks undid
 * @returns {Course}
 */
export function courseOf(steps, incidents) {
  const spans = incidents.flatMap((incident) => incident.spans.map((span) => ({ incident, span })));
  const scheduled = withSchedule(steps);
  const [counted, rest] = [[], []];
  for (let i = 0; i < steps.length; i++) {
    (isKept(steps, i, spans) ? counted : rest).push(i);
  }
  const others = samplesAt(scheduled, byStep(steps, rest));
  const kept = samplesAt(scheduled, byStep(steps, counted));
  return {
    kept,
    others,
    regular: recorded(kept, 0),
    dense: recorded(kept, 1),
    at: distinct(kept, others),
    loops: spans.map(({ incident, span: [from, to] }) => ({
      incident,
      from: stepAt(steps, from),
      to: stepAt(steps, to),
    })),
  };
}

/** Returns the attempts at a step: those that count first. @returns {[Columns, number][]} */
export function attemptsAt({ kept, others }, step) {
  return [kept, others].flatMap((columns) => {
    const found = [];
    let i = columns.length > 0 ? lowerBound(columns.step, step, columns.length) : 0;
    for (; i < columns.length && columns.step[i] === step; i++) found.push([columns, i]);
    return found;
  });
}

function isKept(steps, i, spans) {
  const attempt = steps.attempt[i];
  if (steps.taken && steps.taken[i] === 0) return false;
  return !spans.some(({ span: [from, to] }) => attempt >= from && attempt <= to);
}

/** Sorts indices by step; of equal steps, the earlier attempt comes first. */
function byStep({ step }, indices) {
  const isSorted = indices.every((i, k) => k === 0 || step[indices[k - 1]] <= step[i]);
  return isSorted ? indices : indices.sort((a, b) => step[a] - step[b] || a - b);
}

/** Adds the rate that the schedule asks for, where another one is applied. */
function withSchedule(columns) {
  const { learning_rate: rates, lr_factor: factors } = columns;
  if (!rates || !factors) return columns;
  const scheduled = rates.map((rate, i) => factors[i] === 1 ? NaN : rate / factors[i]);
  return { ...columns, scheduled_rate: scheduled };
}

/** Returns the samples that are recorded only around an incident (1), or all others (0). */
function recorded(columns, dense) {
  if (!columns.dense) return dense ? samplesAt(columns, []) : columns;
  return samplesAt(columns, Array.from(columns.dense.keys()).filter((i) => columns.dense[i] === dense));
}

function distinct(kept, others) {
  const steps = [...(kept.step ?? []), ...(others.step ?? [])];
  return Float64Array.from(new Set(steps)).sort();
}

/** Returns the step of an attempt; of one that was not recorded, from its neighbour. */
function stepAt(steps, attempt) {
  const i = nearest(steps.attempt ?? [], attempt, steps.length);
  return i < 0 ? 0 : steps.step[i] + attempt - steps.attempt[i];
}
