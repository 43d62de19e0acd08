/**
 * Loads the data of the selected runs into the store and the views; a new request aborts the old one.
 *
 * If a part fails, the message is shown in its place, and the other parts are not affected. Layers
 * are large, and are fetched again only if there is a new step.
 */

import { fetchIncidents, fetchLayers, fetchRuns, fetchSteps, fetchVerdict } from "./api.js";
import { mergeColumns, ofOptimizer } from "./columns.js";
import { courseOf } from "./course.js";
import { damaged, failure, loading, noLayers, noSteps } from "./messages.js";

/**
 * @param {object} store
 * @param {object} views  heatmap, comparison, and `say(kind, message)` for the page
 */
export function createLoader(store, views) {
  const latest = { run: newest(), layers: newest(), other: newest() };
  let drawn = "";

  async function reloadRuns() {
    try {
      const runs = await fetchRuns();
      const { run, other, optimizer } = store.get();
      const shown = found(runs, run) ?? runToShow(runs);
      store.set({
        runs,
        run: shown?.run ?? "",
        optimizer: oneOf(shown, optimizer),
        other: found(runs, other) ? other : "",
      });
      if (runs.length === 0) views.say("empty");
    } catch (error) {
      views.say("error", failure(error, reload));
    }
  }

  /** Loads steps and incidents of the run; data of another run are removed first. */
  async function loadRun({ fresh }) {
    const { run, optimizer } = store.get();
    if (!run) return;
    const signal = latest.run();
    if (fresh) {
      views.say("loading", loading(`run ${run}`));
      views.heatmap.show(null, loading("layers"));
    }
    try {
      const [{ steps, course, incidents }, verdict] = await Promise.all([
        fetchRun(run, optimizer, signal),
        fetchVerdict(run, signal),
      ]);
      const { incident } = store.get();
      const known = incidents.some((each) => each.id === incident);
      const info = found(store.get().runs, run);
      const lost = Math.max(0, (info?.incidents ?? 0) - incidents.length);
      const notes = [damaged(info?.problem, lost), steps.length === 0 && noSteps()];
      views.say("ready", notes);
      store.set({ steps, course, incidents, verdict, incident: known ? incident : null });
      const extent = [run, optimizer, steps.length, steps.attempt?.[steps.length - 1]].join();
      await Promise.all([extent !== drawn && loadLayers(), loadOther()]);
      drawn = extent;
    } catch (error) {
      if (error.name !== "AbortError") views.say("error", failure(error, reload));
    }
  }

  async function loadLayers() {
    const { run, optimizer, quantity } = store.get();
    const signal = latest.layers();
    try {
      const layers = await fetchLayers(run, optimizer, quantity, signal);
      const none = layers.names.length === 0 || layers.attempts.length === 0;
      views.heatmap.show(layers, none ? noLayers(quantity) : null);
    } catch (error) {
      if (error.name !== "AbortError") views.heatmap.show(null, failure(error, loadLayers));
    }
  }

  async function loadOther() {
    const { runs, other, optimizer } = store.get();
    const signal = latest.other();
    if (!other) return store.set({ rival: null });
    try {
      const its = oneOf(found(runs, other), optimizer);
      return store.set({ rival: { run: other, ...(await fetchRun(other, its, signal)) } });
    } catch (error) {
      if (error.name === "AbortError") return undefined;
      store.set({ rival: null });
      return views.comparison.fail(failure(error, loadOther));
    }
  }

  async function reload() {
    const { run, optimizer, steps } = store.get();
    await reloadRuns();
    const same = store.get().run === run && store.get().optimizer === optimizer;
    if (same) await loadRun({ fresh: steps === null });
  }

  store.on(["run", "optimizer"], ({ runs, run, optimizer }) => {
    const its = oneOf(found(runs, run), optimizer);
    if (its !== optimizer) return store.set({ optimizer: its });
    store.set({ steps: null, course: null, incidents: [], verdict: null });
    return run && loadRun({ fresh: true });
  });
  store.on(["quantity"], loadLayers);
  store.on(["other"], loadOther);
  return { reload };
}

async function fetchRun(run, optimizer, signal) {
  const [steps, incidents] = await Promise.all([
    fetchSteps(run, optimizer, signal),
    fetchIncidents(run, signal),
  ]);
  const windows = incidents.map(({ around }) => ofOptimizer(around, optimizer));
  const merged = mergeColumns(steps, windows);
  return { steps: merged, course: courseOf(merged, incidents), incidents };
}

const found = (runs, name) => runs.find((each) => each.run === name);

/** Returns the requested optimizer if the run has it, otherwise the first one of the run. */
function oneOf(run, optimizer) {
  const known = run?.optimizers.map(({ index }) => index) ?? [];
  return known.includes(optimizer) ? optimizer : (known[0] ?? 0);
}

/**
 * Returns the run to show first: the one with most steps among the runs with incidents, or among all
 * runs if none has incidents. A damaged run is chosen only if all are damaged.
 */
function runToShow(runs) {
  const weight = ({ incidents, problem }) => (problem ? 0 : 2) + (incidents > 0 ? 1 : 0);
  return [...runs].sort((a, b) => weight(b) - weight(a) || b.last - a.last)[0];
}

/** Returns a function that aborts the previous request and returns a signal for a new one. */
function newest() {
  let controller = new AbortController();
  return () => {
    controller.abort();
    controller = new AbortController();
    return controller.signal;
  };
}
