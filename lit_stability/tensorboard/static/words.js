/** Texts that describe an incident. */

import { markOf } from "./theme.js";
import { plural } from "./scales.js";

const OUTCOMES = {
  recovered: "The run learns again.",
  contained: "The steps are healthy again, but the run does not learn: its loss is higher than before, or that of its start.",
  recurring: "The run was healthy again, but an incident at the same place came before or after.",
  observed: "Nothing was changed: no callback responded, or no response was needed.",
  handled: "Healthy steps followed, and the run ended before they were enough to confirm it.",
  stopped: "The run was stopped: no response was left in the budget, or none could help.",
  unresolved: "The run ended without a healthy step after it.",
  open: "Not known yet: the incident is still open.",
};

const VERDICTS = {
  transient: "It did not recur when the same steps were run again.",
  deterministic: "It recurred when the same steps were run again.",
};

/** Returns "● recovered". */
export const outcomeText = ({ outcome }) => `${markOf(outcome).sign} ${markOf(outcome).word}`;

/** Returns the outcome of the incident, and whether it recurred when the steps were run again. */
export function outcomeSentences({ outcome, verdict, closed_step: closed, step }) {
  const after = closed === null || closed === undefined
    ? ""
    : ` Closed at step ${closed}, ${plural(Math.abs(closed - step), "step")} after it opened.`;
  return [(OUTCOMES[outcome] ?? String(outcome)) + after, VERDICTS[verdict]].filter(Boolean);
}

/** Returns the most affected layer; "" if it is not known. */
export function worstLayer({ origin, layers }) {
  return origin?.module || layers?.[0]?.[0] || "";
}

/** Returns "1: discriminator". */
export const optimizerText = ({ index, part }) => (part ? `${index}: ${part}` : String(index));

/** Returns the responses in order; repeated ones are counted: ["step skipped (2x)", ...]. */
export function responses({ responses: given = [] }) {
  const runs = [];
  for (const text of given) {
    if (runs.length > 0 && runs[runs.length - 1].text === text) runs[runs.length - 1].times += 1;
    else runs.push({ text, times: 1 });
  }
  return runs.map(({ text, times }) => (times > 1 ? `${text} (${times}x)` : text));
}

/** Returns each kind of response once, with its number: ["step retried (8x)", "step skipped (8x)"]. */
export function responseKinds({ responses: given = [] }) {
  const tally = new Map();
  for (const text of given) tally.set(text, (tally.get(text) ?? 0) + 1);
  return [...tally].map(([text, times]) => (times > 1 ? `${text} (${times}x)` : text));
}

/** Returns the best supported cause with its certainty. */
export function causeText({ cause, hypotheses }) {
  const best = hypotheses?.[0];
  if (!best && !cause) return "not known";
  return best && best.cause === cause ? `${cause} (${best.certainty})` : cause || best.cause;
}

/** Returns "model.py:42"; "" if the file is not known. */
export function place({ file, line }) {
  return file ? `${file.split(/[\\/]/).pop()}:${line}` : "";
}

/** Returns clock time and date of a time in seconds since 1970. */
export function moment(seconds) {
  const date = new Date(seconds * 1000);
  if (Number.isNaN(date.getTime())) return { clock: "", date: "" };
  const two = (value) => String(value).padStart(2, "0");
  return {
    clock: [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(":"),
    date: `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`,
  };
}

/** Returns Python code that loads the saved incident folder. */
export function loadingCode(path) {
  return [
    "from pathlib import Path",
    "",
    "import torch",
    "",
    `folder = Path(${JSON.stringify(path)})`,
    'print((folder / "report.md").read_text(encoding="utf8"))',
    "# Pickled objects: load only what your own run has written.",
    'context = torch.load(folder / "scene.pt", weights_only=False)',
    'batch, gradients = context["batch"], context["gradients"]',
    'state = folder / "checkpoint.ckpt"',
    'checkpoint = torch.load(state, map_location="cpu", weights_only=False)',
  ].join("\n");
}
