/**
 * Entry point of the Stability tab, which TensorBoard imports in an iframe.
 *
 * Each view is one file. Views share one store and do not call each other.
 */

import { createComparison } from "./comparison.js";
import { createDetail } from "./detail.js";
import { el, replace } from "./dom.js";
import { createHeatmap } from "./heatmap.js";
import {
  isDark,
  onAddressChange,
  onDataReloaded,
  onThemeChange,
  readAddress,
  writeAddress,
} from "./host.js";
import { createIncidents, moveIncident } from "./incidents.js";
import { createLoader } from "./loader.js";
import { noRun } from "./messages.js";
import { createStore, currentIncident } from "./store.js";
import { createTimeline } from "./timeline.js";
import { createToolbar } from "./toolbar.js";
import { createVerdict } from "./verdict.js";

const STYLES = ["theme.css", "page.css", "incident.css", "detail.css", "heatmap.css", "narrow.css"];

/** Creates the page in this document. */
export async function render() {
  await Promise.all(STYLES.map(loadStyle));
  document.documentElement.lang = "en";
  document.title = "Stability";
  light(isDark());
  const store = createStore({
    ...fromAddress(),
    runs: [],
    scale: "log",
    steps: null,
    course: null,
    rival: null,
    incidents: [],
    verdict: null,
    dark: isDark(),
  });
  const heatmap = createHeatmap(store);
  const comparison = createComparison(store);
  const page = shell(store, heatmap, comparison);
  document.body.replaceChildren(page.element);
  const loader = createLoader(store, {
    heatmap,
    comparison,
    say: (kind, message) =>
      page.say(kind, message ?? (kind === "empty" ? noRun(() => loader.reload()) : null)),
  });
  connect(store, loader);
  await loader.reload();
}

function shell(store, heatmap, comparison) {
  const message = el("div", { class: "page-message" });
  const main = el(
    "main",
    {},
    createVerdict(store),
    createIncidents(store),
    comparison.element,
    createTimeline(store),
    heatmap.element,
  );
  const columns = el("div", { class: "columns" }, main, createDetail(store));
  const element = el(
    "div",
    { class: "page", "data-state": "loading" },
    createToolbar(store),
    message,
    columns,
  );
  store.on(
    ["incident", "incidents"],
    (state) => element.classList.toggle("with-detail", Boolean(currentIncident(state))),
  );
  return {
    element,
    say(kind, content) {
      element.dataset.state = kind;
      replace(message, content);
      columns.hidden = kind !== "ready";
    },
  };
}

function connect(store, loader) {
  onThemeChange(() => {
    light(isDark());
    store.set({ dark: isDark() });
  });
  onDataReloaded(loader.reload);
  onAddressChange(() => store.set(fromAddress(store.get())));
  store.on(["run", "other", "optimizer", "incident", "quantity", "range", "steps"], (state) => {
    if (state.steps) writeAddress(toAddress(state), isAnother(state));
  });
  document.addEventListener("keydown", (event) => onKey(event, store));
}

function onKey(event, store) {
  if (event.key === "Escape") return store.set({ incident: null });
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const free = event.target === document.body && store.get().incident !== null;
  if (!by || !free) return undefined;
  event.preventDefault();
  return moveIncident(store, by);
}

/** Returns the state from the address; what is missing there is taken from the current state. */
function fromAddress(state = {}) {
  const { run, compare, optimizer, incident, quantity, from, to } = readAddress();
  const range = [Number(from), Number(to)];
  return {
    run: run ?? state.run ?? "",
    other: compare ?? "",
    optimizer: wholeNumber(optimizer) ?? 0,
    incident: wholeNumber(incident),
    quantity: quantity === "update_ratio" ? quantity : "grad_norm",
    range: from !== undefined && range.every(Number.isFinite) && range[1] > range[0] ? range : null,
  };
}

/**
 * Returns whether another run, optimizer or incident is shown than in the address, so that a new
 * entry of the browser's history is needed. An address with an unknown run is replaced instead:
 * otherwise the back button would always return to it.
 */
function isAnother({ runs, run, optimizer, incident }) {
  const before = fromAddress();
  if (!runs.some((each) => each.run === before.run)) return false;
  const opened = incident !== null && incident !== before.incident;
  return run !== before.run || optimizer !== before.optimizer || opened;
}

const wholeNumber = (text) => (/^\d+$/.test(text ?? "") ? Number(text) : null);

function toAddress({ run, other, optimizer, incident, quantity, range }) {
  const [from, to] = range ? range.map(Math.round) : ["", ""];
  return {
    run,
    compare: other,
    optimizer: optimizer || "",
    incident,
    quantity: quantity === "grad_norm" ? "" : quantity,
    from,
    to,
  };
}

function light(dark) {
  document.documentElement.classList.toggle("dark", dark);
}

function loadStyle(name) {
  return new Promise((resolve) => {
    const link = el("link", {
      rel: "stylesheet",
      href: new URL(name, import.meta.url).href,
      onload: resolve,
      onerror: resolve,
    });
    document.head.append(link);
  });
}
