/** The list of incidents: equal ones are one row that unfolds; with a search and an order. */

import { el, replace, section } from "./dom.js";
import { groupIncidents, groupOf, matching, ORDERS, sorted } from "./incident_groups.js";
import { groupRow, headRow, incidentRow, usedColumns } from "./incident_rows.js";
import { plural } from "./scales.js";
import { moment } from "./words.js";

const MOVES = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };

/** @returns {HTMLElement} the section, which is updated when the store changes. */
export function createIncidents(store) {
  const [head, body] = [el("thead"), el("tbody")];
  const frame = el("div", { class: "frame" }, el("table", {}, head, body));
  const none = el("div", { class: "message" });
  const list = { query: "", order: ORDERS[0][0], unfolded: new Set(), drawn: "", chosen: null, redraw: null };
  const draw = () => drawList(store, list, { head, body, frame, none }, tools);
  const tools = controls(list, draw);
  list.redraw = draw;
  body.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES)) return;
    event.preventDefault();
    event.stopPropagation();
    moveIncident(store, MOVES[event.key]);
    body.querySelector('tr[aria-selected="true"] button')?.focus();
  });
  store.on(["run"], () => {
    list.unfolded = new Set();
  });
  store.on(["incidents", "verdict", "steps"], draw);
  store.on(["incident", "verdict"], (state) => {
    if (!unfoldChosen(state, list)) return;
    draw();
    markChosen(state, body, true);
  });
  return section("incidents", "Incidents", tools, none, frame);
}

/** Unfolds the group of an incident that was just selected; returns whether another one was. */
function unfoldChosen({ incident, incidents, verdict }, list) {
  if (incident === list.chosen || (incident !== null && !verdict)) return false;
  list.chosen = incident;
  const groups = groupIncidents(incidents, verdict?.groups ?? []);
  const group = groupOf(groups, incidents.find(({ id }) => id === incident));
  if (group?.incidents.length > 1) list.unfolded.add(group.key);
  return true;
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

function controls(list, draw) {
  const search = el("input", {
    type: "search",
    placeholder: "search incidents",
    "aria-label": "Search incidents by kind, cause, layer, response or outcome",
    oninput: () => {
      list.query = search.value;
      draw();
    },
  });
  const order = el(
    "select",
    {
      "aria-label": "Order of the incidents",
      onchange: () => {
        list.order = order.value;
        draw();
      },
    },
    ORDERS.map(([value, text]) => el("option", { value }, text)),
  );
  return [search, order];
}

function drawList(store, list, { head, body, frame, none }, tools) {
  const { incidents, verdict, steps, run } = store.get();
  const groups = groupIncidents(incidents, verdict?.groups ?? []);
  const shown = sorted(matching(groups, list.query), list.order);
  for (const each of tools) each.hidden = incidents.length < 2;
  frame.hidden = shown.length === 0;
  none.hidden = shown.length > 0;
  replace(none, incidents.length > 0 ? "No incident fits the search." : steps ? calm(steps) : "");
  const key = [run, list.query, list.order, ...list.unfolded, ...incidents.map(({ key }) => key)];
  key.push(JSON.stringify(verdict));
  if (list.drawn === key.join()) return; // same data after a reload: keep the focus
  list.drawn = key.join();
  const columns = usedColumns(groups);
  const dated = new Set(incidents.map(({ time }) => moment(time).date)).size > 1;
  replace(head, headRow(columns));
  replace(body, shown.map((group) => rowsOf(store, list, group, { columns, dated })));
  markChosen(store.get(), body);
}

function rowsOf(store, list, group, { columns, dated }) {
  const inner = group.incidents.length > 1;
  const unfolded = list.unfolded.has(group.key);
  const rows = group.incidents.map((incident) => () =>
    incidentRow(incident, columns, {
      dated,
      inner,
      open: () => store.set({ incident: incident.id }),
    })
  );
  if (!inner) return rows[0]();
  const toggle = (event) => {
    event.stopPropagation();
    if (!list.unfolded.delete(group.key)) list.unfolded.add(group.key);
    list.redraw();
  };
  const head = groupRow(group, columns, { dated, unfolded, toggle });
  return unfolded ? [head, ...rows.map((make) => make())] : head;
}

function calm(steps) {
  if (steps.length === 0) return "No incident in this run yet.";
  return "No incident in this run. To test one, add a lit_stability.faults.FaultInjector to the " +
    "callbacks.";
}

function markChosen({ incident }, body, scroll = false) {
  for (const each of body.rows) {
    const chosen = each.dataset.id === String(incident);
    each.setAttribute("aria-selected", String(chosen));
    if (chosen && scroll) each.scrollIntoView({ block: "nearest" });
  }
}
