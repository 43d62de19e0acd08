/** The verdict at the top of the page: what the incidents mean, what to do, and whether the run goes on. */

import { el, prose, replace } from "./dom.js";
import { runStatus } from "./run_status.js";

const SIGNS = { ok: "✓", watch: "!", act: "▲" };

/** @returns {HTMLElement} the section, which is updated when the store changes. */
export function createVerdict(store) {
  const element = el("section", { class: "verdict", "aria-label": "Verdict", role: "status" });
  const draw = ({ verdict, runs, run }) => {
    element.hidden = !verdict;
    if (!verdict) return;
    element.dataset.level = verdict.level;
    replace(element, content(verdict, runStatus(runs.find((each) => each.run === run))));
  };
  store.on(["verdict", "runs", "run"], draw);
  return element;
}

function content({ level, text, do: advice }, { state, text: status }) {
  return [
    el("span", { class: "sign", "aria-hidden": "true" }, SIGNS[level] ?? SIGNS.watch),
    el(
      "div",
      { class: "finding" },
      el("strong", {}, capitalised(text)),
      advice && el("p", {}, el("strong", {}, "To do: "), prose(advice)),
    ),
    status && el("span", { class: "run-status", "data-run-state": state }, status),
  ];
}

const capitalised = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);
