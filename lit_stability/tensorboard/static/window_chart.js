/** A chart of all steps around an incident: loss, gradient norm, learning rate. */

import { layeredCanvas, vertical } from "./canvas.js";
import { slice } from "./curve.js";
import { el } from "./dom.js";
import { drawPins, drawSpans, undoneBy } from "./marks.js";
import { drawPanel, drawXAxis } from "./panels.js";
import { count, linearScale, nearest } from "./scales.js";
import { stepNotes, stepRows, stepTitle } from "./step_words.js";
import { colours } from "./theme.js";
import { attachCursor, createTooltip } from "./tooltip.js";

const [LEFT, RIGHT, TOP, GAP, AXIS] = [64, 20, 28, 10, 24];
const PANELS = [
  { title: "loss", height: 96, lines: [["loss", "loss"]], switched: true },
  {
    title: "gradient norm",
    height: 96,
    lines: [["grad_norm", "norm"], ["clip_threshold", "clip", [5, 3], "clip threshold"]],
    switched: true,
  },
  {
    title: "applied learning rate",
    height: 68,
    lines: [["learning_rate", "rate"]],
    switched: true,
  },
];

/** @returns {{element: HTMLElement, draw: () => void}} */
export function createWindowChart(incident, incidents) {
  const columns = incident.window;
  const layers = layeredCanvas(
    `Steps around incident ${incident.id}, ${columns.length} of them. Shift with arrows reads values.`,
    () => draw(),
  );
  const tooltip = createTooltip(layers.element);
  const range = [columns.attempt[0] - 0.5, columns.attempt[columns.length - 1] + 0.5];
  const x = () => linearScale(range, [LEFT, layers.width() - RIGHT], layers.width() / 80);
  const draw = () => drawAll(incident, incidents, layers, x(), range);
  let at = nearest(columns.attempt, incident.attempt, columns.length);
  const show = (i, py) => {
    at = i;
    const px = x().px(columns.attempt[i]);
    vertical(layers.beginCursor(), px, TOP - 6, layers.element.clientHeight - AXIS, colours().ink);
    const notes = stepNotes(columns, i, incidents, undoneBy(incidents, columns.attempt[i]));
    tooltip.show([px, py], stepTitle(columns, i), stepRows(columns, i), notes);
  };
  attachCursor(layers.element, {
    point: (px, py) => show(nearest(columns.attempt, x().value(px), columns.length), py),
    step: (by) => show(Math.min(Math.max(at + by, 0), columns.length - 1), TOP),
    leave: () => {
      tooltip.hide();
      layers.beginCursor();
    },
  });
  return { element: layers.element, draw };
}

function drawAll(incident, incidents, layers, x, range) {
  const steps = incident.window;
  const shown = PANELS.filter(({ lines }) =>
    lines.some(([field]) => steps[field]?.some(Number.isFinite))
  );
  const bottom = TOP + shown.reduce((sum, each) => sum + each.height + GAP, 0);
  const context = layers.begin(bottom + AXIS);
  const palette = colours();
  const edges = [LEFT, layers.width() - RIGHT];
  const view = {
    context,
    line: { columns: steps, indices: slice(steps.attempt, range, steps.length) },
    axis: "attempt",
    x,
    edges,
    palette,
  };
  drawSpans(context, incidents, x, edges, TOP, bottom, palette);
  let top = TOP;
  for (const panel of shown) {
    drawPanel(view, panel, top, Boolean(panel.switched));
    top += panel.height + GAP;
  }
  drawXAxis(view, bottom, "attempt");
  drawPins(context, incidents, incident.id, x, range, 12, bottom, palette, "attempt");
}

/** Creates a table of the same numbers. */
export function windowTable({ window: columns, attempt }) {
  const fields = [
    "attempt",
    "step",
    "loss",
    "grad_norm",
    "clip_threshold",
    "learning_rate",
    "lr_factor",
    "update_ratio",
    "loss_scale",
  ];
  const there = fields.filter((field) => field in columns);
  const rows = Array.from({ length: columns.length }, (_, i) =>
    el(
      "tr",
      {
        class: [columns.attempt[i] === attempt && "opened", columns.taken?.[i] === 0 && "rejected"]
          .filter(Boolean).join(" "),
      },
      there.map((field) =>
        el(
          "td",
          {},
          field === "attempt" || field === "step"
            ? count(columns[field][i])
            : cell(columns[field][i]),
        )
      ),
    ));
  const head = el(
    "thead",
    {},
    el("tr", {}, there.map((field) => el("th", { scope: "col" }, field.replaceAll("_", " ")))),
  );
  return el("div", { class: "frame" }, el("table", {}, head, el("tbody", {}, rows)));
}

const cell = (
  value,
) => (Number.isFinite(value)
  ? Number(value.toPrecision(5)).toString()
  : Number.isNaN(value)
  ? "NaN"
  : value > 0
  ? "∞"
  : "-∞");
