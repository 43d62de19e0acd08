/** Compares two runs: a table of what differs, above the time line, which shows both. */

import { el, replace, section } from "./dom.js";
import { summary } from "./incidents.js";
import { runStatus } from "./run_status.js";
import { count, ratio, short } from "./scales.js";

/** Rows of the table: name, value of a run, text of the value. */
const ROWS = [
  ["final loss", ({ course }) => last(course.kept.loss), short],
  ["lowest loss", ({ course }) => lowest(course.kept.loss), short],
  ["last step", ({ course }) => last(course.kept.step), count],
  ["incidents", ({ incidents }) => incidents.length, (value, run) => summary(run.incidents)],
  ["learning rate at the end", ({ course }) => last(course.kept.learning_rate), short],
];

/** @returns {{element: HTMLElement, fail: (message: Node) => void}} */
export function createComparison(store) {
  const body = el("div");
  const element = section("comparison", "Comparison", [], body);
  element.hidden = true;
  let shown = "";
  store.on(["rival", "steps"], ({ rival, course, run, runs, incidents }) => {
    element.hidden = !rival || !course;
    if (element.hidden) {
      shown = rival ? shown : "";
      return;
    }
    replace(body, table([{ run, course, incidents }, rival], runs));
    if (rival.run !== shown) element.scrollIntoView({ block: "start" });
    shown = rival.run;
  });
  return {
    element,
    fail(message) {
      element.hidden = false;
      replace(body, message);
    },
  };
}

function table(pair, runs) {
  const head = el(
    "tr",
    {},
    el("th", { scope: "col" }, ""),
    pair.map(({ run }, i) => el("th", { scope: "col" }, stroke(i), el("strong", {}, run))),
    el("th", { scope: "col" }, "difference"),
  );
  const rows = ROWS.map(([name, value, text]) => row(name, pair, value, text));
  const states = pair.map(({ run }) => runStatus(runs.find((each) => each.run === run)).text);
  const status = el(
    "tr",
    {},
    el("th", { scope: "row" }, "status"),
    states.map((text) => el("td", {}, text || "–")),
    el("td"),
  );
  return el(
    "table",
    { class: "differences" },
    el("thead", {}, head),
    el("tbody", {}, rows, states.some(Boolean) && status),
  );
}

function row(name, pair, value, text) {
  const values = pair.map(value);
  const cells = values.map((each, i) => each === undefined ? "–" : text(each, pair[i]));
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, name),
    cells.map((each) => el("td", {}, each)),
    el("td", {}, difference(name, values)),
  );
}

function difference(name, [first, second]) {
  if (first === undefined || second === undefined) return "";
  if (first === second) return "the same";
  if (name === "last step" || name === "incidents") {
    return `${second > first ? "+" : "−"}${count(Math.abs(second - first))}`;
  }
  return first > 0 && second > 0 ? ratio(second / first) : "";
}

const stroke = (i) =>
  el("span", { class: `stroke ${i === 0 ? "first" : "second"}`, "aria-hidden": "true" });

/** Returns the last finite value; undefined if there is none. */
const last = (values) => values?.findLast(Number.isFinite);

/** Returns the smallest finite value; undefined if there is none. */
function lowest(values) {
  const finite = values?.filter(Number.isFinite) ?? [];
  return finite.length > 0 ? finite.reduce((a, b) => Math.min(a, b)) : undefined;
}
