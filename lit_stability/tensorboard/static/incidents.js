/** The list of incidents: one row per incident, newest last. */

import { button, el, path, replace, section } from "./dom.js";
import { count, plural } from "./scales.js";
import { colourOf } from "./theme.js";
import { causeText, moment, outcomeText, responses, worstLayer } from "./words.js";

const COLUMNS = ["", "time", "step", "kind", "cause", "worst layer", "response", "outcome"];
const MOVES = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };

/** @returns {HTMLElement} the section, which is updated when the store changes. */
export function createIncidents(store) {
  const body = el("tbody");
  const head = el(
    "thead",
    {},
    el("tr", {}, COLUMNS.map((name) => el("th", { scope: "col" }, name))),
  );
  const table = el("table", {}, head, body);
  const frame = el("div", { class: "frame" }, table);
  const none = el("div", { class: "message" });
  const draw = () => drawRows(store, body, frame, none);
  const choose = () => markChosen(store.get(), body);
  body.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES)) return;
    event.preventDefault();
    event.stopPropagation();
    moveIncident(store, MOVES[event.key]);
    body.querySelector('tr[aria-selected="true"] button')?.focus();
  });
  store.on(["incidents", "steps"], draw);
  store.on(["incident"], choose);
  return section("incidents", "Incidents", [], none, frame);
}

/** Selects the next or the previous incident; the first or the last if none is selected. */
export function moveIncident(store, by) {
  const { incidents, incident } = store.get();
  if (incidents.length === 0) return;
  const at = incidents.findIndex((each) => each.id === incident);
  const next = at < 0 ? (by > 0 ? 0 : incidents.length - 1) : at + by;
  store.set({ incident: incidents[Math.min(Math.max(next, 0), incidents.length - 1)].id });
}

/** Returns "3 incidents: 2 recovered, 1 stopped". */
export function summary(incidents) {
  const tally = new Map();
  for (const { outcome } of incidents) tally.set(outcome, (tally.get(outcome) ?? 0) + 1);
  const parts = [...tally].map(([outcome, n]) => `${n} ${outcome}`);
  return incidents.length === 0
    ? "no incident"
    : `${plural(incidents.length, "incident")}: ${parts.join(", ")}`;
}

function drawRows(store, body, frame, none) {
  const { incidents, steps, run } = store.get();
  frame.hidden = incidents.length === 0;
  none.hidden = incidents.length > 0;
  replace(none, steps ? calm(steps) : "");
  const key = [run, ...incidents.map((each) => each.key)].join();
  if (body.key === key) return; // same data after a reload: keep the focus
  body.key = key;
  const days = new Set(incidents.map(({ time }) => moment(time).date));
  replace(body, incidents.map((incident) => row(store, incident, days.size > 1)));
  markChosen(store.get(), body);
}

function calm(steps) {
  if (steps.length === 0) return "No incident in this run yet.";
  const attempts = steps.attempt[steps.length - 1] - steps.attempt[0] + 1;
  return `No incident in this run: ${
    plural(attempts, "attempt")
  } monitored. To test one, add a lit_stability.faults.FaultInjector to the callbacks.`;
}

function row(store, incident, dated) {
  const { clock, date } = moment(incident.time);
  const open = () => store.set({ incident: incident.id });
  const cells = [
    button(String(incident.id), open, {
      "aria-label": `Incident ${incident.id}: ${incident.kind}, ${incident.outcome}`,
    }),
    el(
      "time",
      { title: date, datetime: `${date}T${clock}` },
      dated ? `${date.slice(5)} ${clock}` : clock,
    ),
    count(incident.step),
    el("strong", {}, incident.kind),
    causeText(incident),
    path(worstLayer(incident) || "–", { title: worstLayer(incident) }),
    responses(incident).join(", ") || "nothing changed",
    el("span", { class: `outcome ${colourOf(incident.outcome)}` }, outcomeText(incident)),
  ];
  return el(
    "tr",
    { "data-id": incident.id, onclick: open },
    cells.map((cell) => el("td", {}, cell)),
  );
}

function markChosen({ incident }, body) {
  for (const each of body.rows) {
    const chosen = each.dataset.id === String(incident);
    each.setAttribute("aria-selected", String(chosen));
    if (chosen) each.scrollIntoView({ block: "nearest" });
  }
}
