/**
 * What all views share: which run, which incident, which stretch of attempts, and the data.
 *
 * @typedef {object} State
 * @property {RunInfo[]} runs
 * @property {string} run         run shown; "" before one is known
 * @property {string} other       run it is compared with; "" for none
 * @property {number} optimizer   index of the optimizer whose steps and layers are shown
 * @property {number|null} incident  id of the incident looked at
 * @property {[number, number]|null} range  first and last attempt in view; null for all
 * @property {string} quantity    "grad_norm" or "update_ratio", of the heat map
 * @property {string} scale       "log" or "linear", of the time line
 * @property {Columns|null} steps
 * @property {object[]} incidents
 * @property {boolean} dark
 */

/** A value in one place, and listeners by the keys they care for. */
export function createStore(initial) {
  let state = { ...initial };
  const listeners = [];
  return {
    /** @returns {State} */
    get: () => state,
    /** Change some keys; listeners of those that really changed are called, in their order. */
    set(patch) {
      const changed = Object.keys(patch).filter((key) => patch[key] !== state[key]);
      if (changed.length === 0) return;
      state = { ...state, ...patch };
      for (const [keys, listener] of listeners) {
        if (keys.some((key) => changed.includes(key))) listener(state);
      }
    },
    /** Call `listener(state)` when one of the keys has changed. */
    on(keys, listener) {
      listeners.push([keys, listener]);
    },
  };
}

/** The incident looked at, or undefined. */
export function currentIncident({ incidents, incident }) {
  return incidents.find((each) => each.id === incident);
}

/** Optimizers of the run shown. @returns {{index: number, part: string}[]} */
export function optimizersOf({ runs, run }) {
  return runs.find((each) => each.run === run)?.optimizers ?? [];
}

/** First and last attempt of all that is known; [0, 1] where nothing is. */
export function fullRange({ steps }) {
  if (!steps || steps.length === 0) return [0, 1];
  const first = steps.attempt[0];
  return [first, Math.max(first + 1, steps.attempt[steps.length - 1])];
}

/** First and last attempt in view. */
export function rangeInView(state) {
  return state.range ?? fullRange(state);
}
