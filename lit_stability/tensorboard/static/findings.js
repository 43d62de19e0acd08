/** The sections of an incident; sections without data are omitted. */

import { button, el, path as asCode, prose } from "./dom.js";
import { number } from "./columns.js";
import { short } from "./scales.js";
import { loadingCode, outcomeSentences, place, responses } from "./words.js";

/** The operation that produced the first NaN or Inf. */
export function origin({ origin: found }) {
  if (!found) return null;
  const module = found.module
    ? `${found.module} (${found.module_type})`
    : found.module_type || "the model's own code";
  const rows = [
    [
      "operation",
      el("code", {}, `${found.op} made ${found.value}`),
      `${found.phase} pass, ${found.kernel}`,
    ],
    ["module", asCode(module)],
    [
      "line",
      found.file ? el("code", { title: `${found.file}:${found.line}` }, place(found)) : "not known",
      found.file ? `${found.file}:${found.line}` : "",
    ],
    [
      "kind",
      found.overflow
        ? `overflow of ${found.dtype}, finite in float32`
        : `${found.kind} ${found.tensor ?? ""}`.trim(),
    ],
  ];
  const inputs = (found.inputs ?? []).map((each) => el("li", {}, el("code", {}, inputText(each))));
  return part(
    "Origin of the non-finite value",
    el(
      "dl",
      { class: "facts" },
      rows.map((
        [name, ...texts],
      ) => [
        el("dt", {}, name),
        el(
          "dd",
          {},
          texts.map((text, i) => (i === 0 ? text : el("span", { class: "aside" }, text))),
        ),
      ]),
    ),
    inputs.length > 0 && el("p", { class: "label" }, "Inputs"),
    inputs.length > 0 && el("ul", {}, inputs),
    found.note && el("p", {}, found.note),
    advice("Try", found.advice),
  );
}

function inputText({ name, dtype, shape, minimum, maximum, nonfinite }) {
  const span = minimum === null || minimum === undefined
    ? ""
    : ` in [${short(number(minimum))}, ${short(number(maximum))}]`;
  return `${name} ${dtype}[${shape.join(", ")}]${span}${
    nonfinite ? `, ${nonfinite} non-finite` : ""
  }`;
}

/** The line that made the first NaN or Inf, with the lines around it, as they were in the run. */
export function sourceLines({ origin: found }) {
  if (!found?.source) return null;
  const lines = found.source.split("\n").map((text, i) => {
    const number = found.source_line + i;
    return el(
      "span",
      { class: number === found.line ? "source-line origin" : "source-line" },
      el("span", { class: "line-number", "aria-hidden": "true" }, number),
      text || " ",
    );
  });
  return part(
    `Source, ${place(found)}`,
    el("pre", { class: "source", tabindex: "0", "aria-label": "Source lines of the origin" }, lines),
  );
}

/** The likely causes, best supported first. */
export function causes({ hypotheses = [], remedy }) {
  if (hypotheses.length === 0) {
    return part(
      "Likely causes",
      el("p", {}, "There is no evidence for any known cause."),
      advice("Try", remedy),
    );
  }
  return part("Likely causes, best supported first", el("ol", { class: "causes" }, hypotheses.map(cause)));
}

function cause({ cause: name, certainty, evidence = [], do: remedy, leave }) {
  return el(
    "li",
    { class: certainty },
    el(
      "p",
      { class: "name" },
      el("strong", {}, name),
      el("span", { class: "certainty" }, certainty),
    ),
    el("ul", {}, evidence.map((each) => el("li", {}, prose(each)))),
    advice("Try", remedy),
    advice("When to ignore", leave),
  );
}

/** The responses in order, and the outcome. */
export function tried(incident) {
  const done = responses(incident);
  const list = done.length > 0
    ? el("ol", { class: "tried" }, done.map((text) => el("li", {}, text)))
    : el("p", {}, "Nothing was changed.");
  return part(
    "Responses and outcome",
    list,
    el("p", {}, outcomeSentences(incident).join(" ")),
  );
}

/** The layers named by the anomaly, most affected first. */
export function worstLayers({ layers = [], evidence = [] }) {
  if (layers.length === 0 && evidence.length === 0) return null;
  const rows = layers.map(([name, value]) =>
    el("tr", {}, el("td", {}, asCode(name)), el("td", { class: "number" }, short(number(value))))
  );
  return part(
    "Worst layers and evidence",
    layers.length > 0 && el("table", { class: "layers" }, el("tbody", {}, rows)),
    evidence.length > 0 && el("ul", {}, evidence.map((each) => el("li", {}, prose(each)))),
  );
}

/** The standard checks of an unstable run. */
export function checks({ checks: asked = [] }) {
  if (asked.length === 0) return null;
  return el(
    "details",
    {},
    el("summary", {}, "Standard checks"),
    el("ul", {}, asked.map((each) => el("li", {}, prose(each)))),
  );
}

/** The path of the incident folder, and code to load it. */
export function incidentFolder({ path, pruned }) {
  if (!path) {
    return part(
      "Incident folder",
      el(
        "p",
        {},
        "Not saved. Add AnomalyCheckpoint() after GradientMonitor() to save batch and state.",
      ),
    );
  }
  if (pruned) {
    return part(
      "Incident folder",
      el("p", {}, asCode(path), ": pruned to make room, only its report is left."),
    );
  }
  const code = loadingCode(path);
  return part(
    "Incident folder",
    el("p", {}, asCode(path)),
    el(
      "div",
      { class: "code" },
      el("pre", { tabindex: "0", "aria-label": "Python code that loads the incident folder" }, code),
      copyButton(code),
    ),
  );
}

function copyButton(code) {
  const copy = button("Copy", async () => {
    copy.textContent = (await copied(code)) ? "Copied" : "Select and copy by hand";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  }, { class: "copy" });
  return copy;
}

/** Copies a text. Browsers allow clipboard access on secure pages only; elsewhere a field is used. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = el("textarea", { class: "offscreen" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

const part = (title, ...content) => el("section", {}, el("h3", {}, title), ...content);
const advice = (label, text) =>
  text && el("p", { class: "advice" }, el("strong", {}, `${label}: `), prose(text));
