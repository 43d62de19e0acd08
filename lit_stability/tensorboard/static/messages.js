/** Messages for missing data: the reason, and what to do. */

import { button, el } from "./dom.js";
import { plural } from "./scales.js";

const EXAMPLE = [
  "from lightning import Trainer",
  "from lightning.pytorch.loggers import TensorBoardLogger",
  "from lit_stability import GradientMonitor",
  "",
  'trainer = Trainer(logger=TensorBoardLogger("runs"), callbacks=[GradientMonitor()])',
].join("\n");

/** There is no run. */
export function noRun(retry) {
  return el(
    "div",
    { class: "state empty", role: "status" },
    el("h2", {}, "No run with stability data"),
    el("p", {}, "Add GradientMonitor() to Trainer(callbacks=...) and a TensorBoardLogger:"),
    el("pre", {}, EXAMPLE),
    el(
      "p",
      {},
      "Then start TensorBoard on the logger's folder. A run appears here after its first steps.",
    ),
    button("Reload", retry),
  );
}

/** Shown while data is loading. */
export function loading(what) {
  return el(
    "div",
    { class: "state loading", role: "status" },
    el("span", { class: "spinner", "aria-hidden": "true" }),
    `Loading ${what}…`,
  );
}

/** @param {Error} error @param {() => void} retry */
export function failure(error, retry) {
  return el(
    "div",
    { class: "state failure", role: "alert" },
    el("h2", {}, error.message),
    el("p", {}, error.remedy ?? "See the browser's console, then try again."),
    button("Try again", retry),
  );
}

/**
 * Some data of a run cannot be read; null if all can be read.
 *
 * @param {string|null|undefined} problem  what the plugin reports about its data
 * @param {number} lost  number of incidents whose records cannot be read
 */
export function damaged(problem, lost) {
  if (!problem && lost === 0) return null;
  const texts = [problem, lost > 0 && `${plural(lost, "incident record")} cannot be read`];
  return el(
    "p",
    { class: "damaged", role: "alert" },
    el("strong", {}, "Data of this run are damaged: "),
    `${texts.filter(Boolean).join("; ")}. The rest is shown; TensorBoard's console has details.`,
  );
}

/** The run has no values by layer. */
export function noLayers(quantity) {
  return el(
    "span",
    {},
    quantity === "grad_norm"
      ? "No gradient norms by layer in this run yet: wait for its first steps."
      : "No update-to-weight ratios by layer in this run. Select the gradient norm.",
  );
}

/** The run has no sample yet. */
export const noSteps = () =>
  el(
    "span",
    {},
    "No step of this run has been written yet: wait for the first steps.",
  );
