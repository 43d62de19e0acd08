/**
 * Shows one incident, from its message to the code that loads its folder.
 *
 * It is shown next to the charts and is not a dialog, so the charts stay usable. Escape closes it,
 * arrow keys select the next incident.
 */

import { button, el, path, prose, replace } from "./dom.js";
import { causes, checks, incidentFolder, origin, sourceLines, tried, worstLayers } from "./findings.js";
import { groupIncidents, groupOf } from "./incident_groups.js";
import { moveIncident } from "./incidents.js";
import { count, plural } from "./scales.js";
import { currentIncident, fullRange, optimizersOf } from "./store.js";
import { colourOf } from "./theme.js";
import { createWindowChart, windowTable } from "./window_chart.js";
import { causeText, moment, outcomeText, place, responseKinds, worstLayer } from "./words.js";

const MOVES = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };

/** @returns {HTMLElement} an aside that is hidden while no incident is selected. */
export function createDetail(store) {
  const element = el("aside", {
    class: "detail",
    "aria-label": "Incident",
    tabindex: "-1",
    hidden: true,
  });
  let [chart, key] = [null, ""];
  const draw = (state) => {
    const incident = currentIncident(state);
    element.hidden = !incident;
    if (incident?.key === key) return; // same data after a reload: keep scroll position and focus
    key = incident?.key;
    chart = incident && incident.window.length > 0
      ? createWindowChart(incident, state.incidents)
      : null;
    replace(element, incident ? content(store, incident, chart) : []);
    element.scrollTop = 0;
  };
  element.addEventListener("keydown", (event) => onKey(event, store, element));
  store.on(["incident", "incidents"], draw);
  store.on(["dark"], () => chart?.draw());
  return element;
}

function onKey(event, store, element) {
  if (!(event.key in MOVES) || event.target.closest("summary, .frame")) return;
  event.preventDefault();
  moveIncident(store, MOVES[event.key]);
  element.focus();
}

function content(store, incident, chart) {
  const { incidents, verdict } = store.get();
  return [
    head(store, incident),
    el("p", { class: "headline" }, prose(incident.message)),
    story(incident, groupOf(groupIncidents(incidents, verdict?.groups ?? []), incident)),
    sourceLines(incident),
    el(
      "h3",
      {},
      "Step by step ",
      button("Show on the time line", () => showAround(store, incident)),
    ),
    chart ? chart.element : el("p", { class: "message" }, "The steps around it were not recorded."),
    chart &&
    el("p", { class: "key" }, "○ rejected", " · × NaN or Inf", " · shaded: undone by a rollback"),
    chart && el("details", {}, el("summary", {}, "Show the numbers"), windowTable(incident)),
    origin(incident),
    causes(incident),
    tried(incident),
    worstLayers(incident),
    checks(incident),
    incidentFolder(incident),
  ];
}

function head(store, incident) {
  const { clock, date } = moment(incident.time);
  const { incidents } = store.get();
  const whose = optimizersOf(store.get()).length > 1 ? ` · optimizer ${incident.optimizer}` : "";
  const at = incidents.indexOf(incident);
  const title = el("h2", {}, `Incident ${incident.id}: ${incident.kind}`);
  const when = el(
    "p",
    { class: "when" },
    `step ${
      count(incident.step)
    } · epoch ${incident.epoch}, batch ${incident.batch_idx}${whose} · ${date} ${clock}`,
  );
  const move = (by) => () => moveIncident(store, by);
  return el(
    "header",
    {},
    el("div", { class: "title" }, title, when),
    button("‹", move(-1), { "aria-label": "Previous incident", disabled: at <= 0 }),
    button("›", move(1), { "aria-label": "Next incident", disabled: at >= incidents.length - 1 }),
    button("✕", () => store.set({ incident: null }), {
      "aria-label": "Close, Escape",
      class: "close",
    }),
  );
}

/** Zooms the charts to an incident; in a narrow window they are below it. */
function showAround(store, incident) {
  store.set({ range: around(incident, store.get()) });
  document.querySelector("section.timeline")?.scrollIntoView({ block: "nearest" });
}

/** Returns the range of steps of an incident's window, extended by half its length each way. */
function around({ window: columns, step }, state) {
  const full = fullRange(state);
  const first = columns.length > 0 ? Math.min(...columns.step) : step - 50;
  const last = columns.length > 0 ? Math.max(...columns.step) : step + 50;
  const margin = (last - first) / 2;
  return [Math.max(full[0], first - margin), Math.min(full[1], last + margin)];
}

/** Creates four cells: what was done, what to do, and in smaller print cause and origin. */
function story(incident, group) {
  const cells = [
    ["what was done", done(incident)],
    ["what you should do", toDo(incident, group)],
    ["cause", causeText(incident)],
    ["first seen in", firstSeen(incident)],
  ];
  return el(
    "dl",
    { class: "story" },
    cells.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))),
  );
}

function done(incident) {
  const times = incident.strikes > 1 ? ` after ${plural(incident.strikes, "occurrence")}` : "";
  return [
    responseKinds(incident).join(", ") || "nothing changed",
    el("br"),
    el(
      "span",
      { class: `outcome ${colourOf(incident.outcome)}` },
      outcomeText(incident) + times,
    ),
  ];
}

/** The advice on its group, which knows what the incidents have in common. */
function toDo(incident, group) {
  const { do: advice, ignore, incidents = [] } = group ?? {};
  const notes = [
    ignore && `Safe to ignore ${ignore}.${advice ? "" : ` Otherwise: ${incident.remedy}.`}`,
    incidents.length > 1 && `One of ${incidents.length} of the same cause.`,
  ];
  return [
    prose(advice || (ignore ? "nothing, it was handled" : incident.remedy) || "nothing"),
    notes.filter(Boolean).map((note) => el("span", { class: "aside" }, prose(note))),
  ];
}

function firstSeen(incident) {
  const { origin: found } = incident;
  if (!found) return path(worstLayer(incident) || "no single layer");
  const where = [place(found), `${found.phase} pass`].filter(Boolean).join(", ");
  return [
    path(`${found.op} made ${found.value}`),
    el("br"),
    path(found.module || found.module_type || "the model's own code"),
    el("span", { class: "aside" }, where),
  ];
}
