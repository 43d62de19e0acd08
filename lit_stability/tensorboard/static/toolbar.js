/** The header of the page: selection of the run and of another to compare, and a short summary. */

import { el, replace } from "./dom.js";
import { summary } from "./incidents.js";
import { count, plural } from "./scales.js";
import { optimizersOf } from "./store.js";
import { runStatus } from "./run_status.js";
import { optimizerText } from "./words.js";

/** Number of runs from which on they can be filtered. */
const MANY = 4;

/** @returns {HTMLElement} the header, which is updated when the store changes. */
export function createToolbar(store) {
  const run = el("select", {
    id: "run",
    onchange: () => store.set({ run: run.value, incident: null, range: null }),
  });
  const filter = el("input", {
    type: "search",
    placeholder: "filter runs",
    "aria-label": "Filter the runs by name, number of incidents or status",
    oninput: () => fill(store.get()),
  });
  const optimizer = el("select", {
    id: "optimizer",
    onchange: () => store.set({ optimizer: Number(optimizer.value) }),
  });
  const several = [el("label", { for: "optimizer" }, "optimizer"), optimizer];
  const other = el("select", { id: "other", onchange: () => store.set({ other: other.value }) });
  const chooser = [
    el("label", { for: "run" }, "Run"),
    filter,
    run,
    several,
    el("label", { for: "other" }, "compare with"),
    other,
  ].flat();
  const status = el("p", { class: "summary", role: "status" });
  const fill = (state) => {
    const fits = (each) => textOf(each).toLowerCase().includes(filter.value.toLowerCase());
    const listed = state.runs.filter((each) => each.run === state.run || fits(each));
    replace(run, listed.map((each) => option(each, state.run)));
    const others = state.runs.filter((each) =>
      each.run !== state.run && (each.run === state.other || fits(each))
    );
    replace(
      other,
      el("option", { value: "" }, "no other run"),
      others.map((each) => option(each, state.other)),
    );
    const optimizers = optimizersOf(state);
    replace(optimizer, optimizers.map((each) => optimizerOption(each, state.optimizer)));
    for (const each of chooser) each.hidden = state.runs.length === 0;
    filter.hidden = state.runs.length < MANY;
    for (const each of several) each.hidden = optimizers.length < 2;
    other.disabled = others.length === 0;
    if (state.other === state.run && state.other) store.set({ other: "" });
  };
  fill(store.get());
  store.on(["runs", "run", "optimizer", "other"], fill);
  store.on(["steps", "incidents"], (state) => replace(status, state.steps ? words(state) : ""));
  return el(
    "header",
    { class: "toolbar" },
    el("h1", {}, "Stability"),
    chooser,
    status,
    keys(),
  );
}

function option(info, chosen) {
  return el("option", { value: info.run, selected: info.run === chosen }, textOf(info));
}

function textOf(info) {
  const { run, incidents, problem } = info;
  const notes = [
    incidents > 0 && plural(incidents, "incident"),
    runStatus(info).state,
    problem && "damaged",
  ].filter(Boolean);
  return notes.length > 0 ? `${run} (${notes.join(", ")})` : run;
}

function optimizerOption(optimizer, chosen) {
  const { index } = optimizer;
  return el("option", { value: index, selected: index === chosen }, optimizerText(optimizer));
}

function words({ steps, incidents }) {
  const last = steps.length > 0 ? `step ${count(steps.step[steps.length - 1])}` : "no step yet";
  return `${last} · ${summary(incidents)}`;
}

function keys() {
  const rows = [
    ["↑ ↓", "previous, next incident"],
    ["Esc", "close the incident"],
    ["drag", "zoom to a stretch"],
    ["Ctrl or Alt + wheel", "zoom at the pointer"],
    ["double-click", "show all"],
    ["+ − ← → 0", "zoom, pan, show all, in a picture"],
    ["Shift + ← →", "read values, in a picture"],
  ];
  const list = el(
    "dl",
    {},
    rows.map(([key, text]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, text)]),
  );
  return el("details", { class: "keys" }, el("summary", {}, "Keys"), list);
}
