/**
 * The state that all views share: selected run, incident and range of attempts, and the data.
 *
 * @typedef {object} State
 * @property {RunInfo[]} runs
 * @property {string} run         run shown; "" before one is known
 * @property {string} other       run it is compared with; "" for none
 * @property {number} optimizer   index of the optimizer whose steps and layers are shown
 * @property {number|null} incident  id of the selected incident; null if none
 * @property {[number, number]|null} range  first and last visible step; null for all
 * @property {string} quantity    "grad_norm" or "update_ratio", of the heat map
 * @property {string} scale       "log" or "linear", of the time line
 * @property {Columns|null} steps  all attempts
 * @property {Course|null} course  the same by step
 * @property {Other|null} rival  the run it is compared with
 * @property {object[]} incidents
 * @property {Verdict|null} verdict  of the run shown
 * @property {boolean} dark
 */

/** @typedef {{run: string, steps: Columns, course: Course, incidents: object[]}} Other */

/** Creates a store: one state, and listeners for some of its keys. */
export function createStore(initial) {
  let state = { ...initial };
  const listeners = [];
  return {
    /** @returns {State} */
    get: () => state,
    /** Changes some keys; then calls the listeners of the keys whose values differ, in order. */
    set(patch) {
      const changed = Object.keys(patch).filter((key) => patch[key] !== state[key]);
      if (changed.length === 0) return;
      state = { ...state, ...patch };
      for (const [keys, listener] of listeners) {
        if (keys.some((key) => changed.includes(key))) listener(state);
      }
    },
    /** Calls `listener(state)` when one of the keys has changed. */
    on(keys, listener) {
      listeners.push([keys, listener]);
    },
  };
}

/** Returns the selected incident, or undefined. */
export function currentIncident({ incidents, incident }) {
  return incidents.find((each) => each.id === incident);
}

/** Returns the optimizers of the run shown. @returns {{index: number, part: string}[]} */
export function optimizersOf({ runs, run }) {
  return runs.find((each) => each.run === run)?.optimizers ?? [];
}

/** Returns the first and the last step of the runs shown; [0, 1] if there is none. */
export function fullRange({ course, rival }) {
  const axes = [course?.at, rival?.course.at].filter((at) => at?.length > 0);
  if (axes.length === 0) return [0, 1];
  const first = Math.min(...axes.map((at) => at[0]));
  return [first, Math.max(first + 1, ...axes.map((at) => at[at.length - 1]))];
}

/** Returns the first and the last visible step. */
export function rangeInView(state) {
  return state.range ?? fullRange(state);
}
