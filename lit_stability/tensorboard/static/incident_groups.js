/** Groups, filters and sorts the incidents of a run. Draws nothing. */

import { causeText, outcomeText, responses, worstLayer } from "./words.js";

/**
 * @typedef {{incidents: string[], place: string, sample: string, do: string, ignore: string}} Grouping
 *   as the plugin computes it, with the tags of its incidents
 * @typedef {Grouping & {key: string, incidents: object[]}} Group
 *   at least one incident, the oldest first; `key` is the tag of the first
 */

/** Orders of the list: name, text of the option, and what is compared of two groups. */
export const ORDERS = [
  ["first", "first seen", (a, b) => first(a).attempt - first(b).attempt],
  ["latest", "latest first", (a, b) => latest(b).attempt - latest(a).attempt],
  ["count", "most often", (a, b) => b.incidents.length - a.incidents.length],
  ["kind", "kind", (a, b) => String(first(a).kind).localeCompare(String(first(b).kind))],
];

/**
 * Returns the incidents by cause and sample; an incident that no grouping has is a group of its own.
 *
 * @param {object[]} incidents
 * @param {Grouping[]} groupings
 * @returns {Group[]}
 */
export function groupIncidents(incidents, groupings) {
  const groups = groupings.map((each) => ({
    ...each,
    key: each.incidents[0],
    incidents: incidents.filter((incident) => each.incidents.includes(tagOf(incident))),
  }));
  const grouped = new Set(groupings.flatMap((each) => each.incidents));
  const others = incidents.filter((incident) => !grouped.has(tagOf(incident))).map(alone);
  return [...groups, ...others].filter((group) => group.incidents.length > 0);
}

/** Numbers of incidents start again in another fit in the same folder, so the time is needed too. */
const tagOf = ({ id, time }) => `${id}/${Math.trunc(time)}`;

const alone = (incident) => ({
  key: tagOf(incident),
  place: causeText(incident),
  sample: "",
  do: incident.remedy ?? "",
  ignore: "",
  incidents: [incident],
});

/** Returns the group of an incident, or undefined. */
export const groupOf = (groups, incident) =>
  groups.find(({ incidents }) => incidents.includes(incident));

/** Returns the groups that have incidents with all words of a query, with only those incidents. */
export function matching(groups, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0) return groups;
  const fits = (group) => (incident) => {
    const text = searchText(group, incident);
    return words.every((word) => text.includes(word));
  };
  return groups
    .map((group) => ({ ...group, incidents: group.incidents.filter(fits(group)) }))
    .filter((group) => group.incidents.length > 0);
}

/** Returns the groups in an order of `ORDERS`. */
export function sorted(groups, name) {
  const [, , compare] = ORDERS.find(([each]) => each === name) ?? ORDERS[0];
  return [...groups].sort(compare);
}

function searchText({ place, sample }, incident) {
  return [
    `#${incident.id} step ${incident.step} epoch ${incident.epoch}`,
    ...[place, sample, incident.kind, incident.message, causeText(incident)],
    ...[worstLayer(incident), outcomeText(incident), ...responses(incident)],
  ].join(" ").toLowerCase();
}

const first = ({ incidents }) => incidents[0];
const latest = ({ incidents }) => incidents[incidents.length - 1];
