/**
 * One incident, from the sentence that says what happened to the code that loads its scene.
 *
 * It lies beside the pictures and is no dialog: they stay in use. Escape closes it, arrows go to
 * the next incident.
 */

import { button, el, path, prose, replace } from "./dom.js";
import { causes, checks, origin, scene, tried, worstLayers } from "./findings.js";
import { moveIncident } from "./incidents.js";
import { count, plural } from "./scales.js";
import { currentIncident, fullRange, optimizersOf } from "./store.js";
import { colourOf } from "./theme.js";
import { createWindowChart, windowTable } from "./window_chart.js";
import { causeText, moment, outcomeText, place, responses, worstLayer } from "./words.js";

const MOVES = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };

/** @returns {HTMLElement} an aside, hidden while no incident is looked at. */
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
    if (incident?.key === key) return; // data came again and said the same: keep place and focus
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
  return [
    head(store, incident),
    el("p", { class: "headline" }, prose(incident.message)),
    story(incident),
    el(
      "h3",
      {},
      "Step by step ",
      button("Show on the time line", () => store.set({ range: around(incident, store.get()) })),
    ),
    chart ? chart.element : el("p", { class: "message" }, "The steps around it were not kept."),
    chart &&
    el("p", { class: "key" }, "○ vetoed", " · × NaN or Inf", " · shaded: taken back by a rollback"),
    chart && el("details", {}, el("summary", {}, "Show the numbers"), windowTable(incident)),
    origin(incident),
    causes(incident),
    tried(incident),
    worstLayers(incident),
    checks(incident),
    scene(incident),
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

/** The stretch of attempts that its window covers, half as much again on either side. */
function around({ window: columns, attempt }, state) {
  const full = fullRange(state);
  const first = columns.length > 0 ? columns.attempt[0] : attempt - 50;
  const last = columns.length > 0 ? columns.attempt[columns.length - 1] : attempt + 50;
  const margin = (last - first) / 2;
  return [Math.max(full[0], first - margin), Math.min(full[1], last + margin)];
}

/** Four cells: where, why, what was done, how it ended. */
function story(incident) {
  const done = responses(incident);
  const strikes = incident.strikes > 1 ? ` after ${plural(incident.strikes, "strike")}` : "";
  const cells = [
    ["began in", begun(incident)],
    ["cause", causeText(incident)],
    ["done", done.join(", ") || "nothing changed"],
    [
      "outcome",
      el(
        "span",
        { class: `outcome ${colourOf(incident.outcome)}` },
        outcomeText(incident) + strikes,
      ),
    ],
  ];
  return el(
    "dl",
    { class: "story" },
    cells.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))),
  );
}

function begun(incident) {
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
