/** The rows of the list of incidents: one for an incident, and one that stands for a group of them. */

import { button, el, path } from "./dom.js";
import { count } from "./scales.js";
import { colourOf } from "./theme.js";
import { causeText, moment, outcomeText, responseKinds, worstLayer } from "./words.js";

/** Columns by name: what an incident has in it, "" for nothing; a column without any is hidden. */
const COLUMNS = [
  ["kind", ({ kind }) => kind],
  ["cause", (incident) => (causeText(incident) === "not known" ? "" : causeText(incident))],
  ["worst layer", worstLayer],
  ["response", (incident) => responseKinds(incident).join(", ")],
];

/** Returns the names of the columns that any of the groups has a value for. */
export function usedColumns(groups) {
  const incidents = groups.flatMap((group) => group.incidents);
  const isUsed = ([name, text]) =>
    incidents.some((each) => text(each)) || (name === "cause" && groups.some(({ sample }) => sample));
  return COLUMNS.filter(isUsed).map(([name]) => name);
}

/** Returns the row with the names of the columns. */
export function headRow(columns) {
  const names = ["", "time", "step", ...columns, "outcome"];
  return el("tr", {}, names.map((name) => el("th", { scope: "col", class: cssName(name) }, name)));
}

/**
 * Returns the row of one incident.
 *
 * @param {object} incident
 * @param {string[]} columns  of `usedColumns`
 * @param {{dated: boolean, inner: boolean, open: () => void}} options
 */
export function incidentRow(incident, columns, { dated, inner, open }) {
  const label = `Incident ${incident.id}: ${incident.kind}, ${incident.outcome}`;
  const cells = [
    button(String(incident.id), open, { "aria-label": label }),
    time(incident, dated),
    count(incident.step),
    ...columns.map((name) => valueIn(name, incident)),
    outcome(incident),
  ];
  const attributes = { "data-id": incident.id, class: inner ? "inner" : "", onclick: open };
  return rowOf(attributes, cells, columns);
}

/** Returns the row that stands for the incidents of a group; it folds and unfolds them. */
export function groupRow(group, columns, { dated, unfolded, toggle }) {
  const { incidents } = group;
  const [first, last] = [incidents[0], incidents[incidents.length - 1]];
  const label = `${unfolded ? "▾" : "▸"} ${incidents.length}×`;
  const cells = [
    button(label, toggle, {
      "aria-expanded": String(unfolded),
      "aria-label": `${incidents.length} incidents of the same cause`,
    }),
    time(last, dated),
    `${count(first.step)} … ${count(last.step)}`,
    ...columns.map((name) => name === "cause" ? causeOfGroup(group) : valueIn(name, last)),
    outcome(last),
  ];
  return rowOf({ class: "group", "data-group": group.key, onclick: toggle }, cells, columns);
}

function causeOfGroup({ place, sample, incidents }) {
  const cause = causeText(incidents[0]);
  const details = [cause.startsWith(place) ? "" : place, sample].filter(Boolean).join(", ");
  return [cause, details && el("span", { class: "details" }, details)];
}

function valueIn(name, incident) {
  const text = COLUMNS.find(([each]) => each === name)[1](incident);
  if (name === "kind") return el("strong", {}, text);
  if (name === "worst layer" && text) return path(text, { title: text });
  return text || (name === "response" ? "nothing changed" : "–");
}

const outcome = (incident) =>
  el("span", { class: `outcome ${colourOf(incident.outcome)}` }, outcomeText(incident));

function time(incident, dated) {
  const { clock, date } = moment(incident.time);
  const text = dated ? `${date.slice(5)} ${clock}` : clock;
  return el("time", { title: date, datetime: `${date}T${clock}` }, text);
}

function rowOf(attributes, cells, columns) {
  const names = ["", "time", "step", ...columns, "outcome"];
  return el(
    "tr",
    attributes,
    cells.map((cell, i) => el("td", { class: cssName(names[i]) }, cell)),
  );
}

const cssName = (name) => `col-${name.replace(" ", "-")}`;
