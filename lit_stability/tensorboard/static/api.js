/**
 * Fetches the plugin's data and converts its JSON to typed arrays and objects.
 *
 * @typedef {{run: string, steps: number, layers: number, incidents: number, last: number,
 *   optimizers: {index: number, part: string}[], problem: string|null, updated: number|null,
 *   status: {state: string, step: number, time: number}|null}} RunInfo
 *   `part` is the part of the model that the optimizer trains; `problem` describes damaged data;
 *   `updated` is the time of the last step; `status` is null for a run of an older version.
 * @typedef {{level: string, text: string, do: string, groups: Grouping[]}} Verdict
 * @typedef {{names: string[], attempts: Float64Array, steps: Float64Array, values: Float32Array}} Layers
 *   `values` is row-major, [samples, layers].
 */

import { number, ofOptimizer, toColumns } from "./columns.js";

/** A failed request: what went wrong, and what the user can do about it. */
export class DataError extends Error {
  /** @param {string} message @param {string} remedy */
  constructor(message, remedy) {
    super(message);
    this.remedy = remedy;
  }
}

/** @returns {Promise<RunInfo[]>} */
export const fetchRuns = (signal) => get("runs", {}, signal);

/** @returns {Promise<Columns>} */
export async function fetchSteps(run, optimizer, signal) {
  const { fields, rows, precisions } = await get("steps", { run, optimizer }, signal);
  return toColumns(fields, rows, precisions);
}

/**
 * @returns {Promise<object[]>} Incidents in the order they were opened. `around` has the attempts
 *   of all optimizers near the incident, `window` only those of the `optimizer` it occurred in; `key`
 *   changes whenever any other field changes.
 */
export async function fetchIncidents(run, signal) {
  const incidents = await get("incidents", { run }, signal);
  for (const incident of incidents) {
    incident.key = JSON.stringify(incident);
    const { fields = [], rows = [] } = incident.window ?? {};
    incident.around = toColumns(fields, rows);
    incident.optimizer = optimizerAt(incident);
    incident.window = ofOptimizer(incident.around, incident.optimizer);
    incident.spans ??= [];
  }
  return incidents.sort((a, b) => a.attempt - b.attempt);
}

/** @returns {Promise<Verdict>} what the incidents of a run mean, and their groups. */
export const fetchVerdict = (run, signal) => get("verdict", { run }, signal);

/** The optimizer whose attempt opened the incident; the first one if it is not known. */
function optimizerAt({ around, attempt }) {
  const at = around.attempt?.indexOf(attempt) ?? -1;
  return at < 0 ? 0 : (around.optimizer?.[at] ?? 0);
}

/** @returns {Promise<Layers>} */
export async function fetchLayers(run, optimizer, quantity, signal) {
  const query = { run, optimizer, quantity };
  const { names, attempts, steps, values } = await get("layers", query, signal);
  return {
    names,
    attempts: Float64Array.from(attempts, number),
    steps: Float64Array.from(steps, number),
    values: toFloats(values),
  };
}

function toFloats(base64) {
  const bytes = Uint8Array.fromBase64?.(base64) ?? bytesOf(atob(base64));
  return new Float32Array(bytes.buffer, 0, bytes.length >> 2);
}

function bytesOf(binary) {
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function get(route, query, signal) {
  const url = new URL(`../${route}`, import.meta.url);
  for (const [key, value] of Object.entries(query)) url.searchParams.set(key, value);
  const response = await reach(url, signal);
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  throw new DataError(
    body?.error ?? `TensorBoard answered ${response.status} to "${route}"`,
    body?.do ?? "See the console in which TensorBoard runs, then try again.",
  );
}

async function reach(url, signal) {
  try {
    return await fetch(url, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new DataError(
      "TensorBoard does not answer",
      "Check that it is still running (tensorboard --logdir FOLDER), then try again.",
    );
  }
}
