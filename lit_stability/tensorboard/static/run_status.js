/** Texts for whether a run goes on, and how it ended. */

import { count } from "./scales.js";

const QUIET = 600; // seconds without a new step after which a run may no longer be alive
const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60]];

/**
 * Returns the state of a run and its text: {state: "running", text: "running, step 1,200"}.
 *
 * A process that was killed cannot write that it ended, so a long silence is shown as such.
 *
 * @param {RunInfo|undefined} run
 * @param {number} now  in seconds since 1970
 */
export function runStatus(run, now = Date.now() / 1000) {
  const { status, updated, last } = run ?? {};
  if (!status) return { state: "", text: "" };
  if (status.state !== "running") {
    return { state: status.state, text: `${status.state} at step ${count(status.step)}` };
  }
  const silent = now - Math.max(updated ?? 0, status.time);
  if (silent > QUIET) return { state: "silent", text: `no new step for ${duration(silent)}` };
  return { state: "running", text: `running, step ${count(last ?? status.step)}` };
}

/** Returns "3 hours"; whole units, rounded down. */
function duration(seconds) {
  const [unit, size] = UNITS.find(([, each]) => seconds >= each) ?? UNITS[2];
  const number = Math.floor(seconds / size);
  return `${count(number)} ${unit}${number === 1 ? "" : "s"}`;
}
