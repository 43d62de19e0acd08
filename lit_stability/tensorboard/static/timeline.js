/**
 * The time line: all measurements of a run by step, with its incidents, and those of another run.
 *
 * All panels share the x axis. Attempts that a rollback undid, or that were rejected, are faint points
 * at their steps; an arrow leads from where the run was back to where it went on from.
 */

import { BANDS, drawBand } from "./bands.js";
import { gutter, layeredCanvas, vertical } from "./canvas.js";
import { attemptsAt } from "./course.js";
import { slice } from "./curve.js";
import { button, choice, el, section } from "./dom.js";
import { drawLoops, drawPins, pinAt, undoneBy } from "./marks.js";
import { drawPanel, drawXAxis } from "./panels.js";
import { linearScale, nearest } from "./scales.js";
import { attemptNote, stepNotes, stepRows, stepTitle, withRival } from "./step_words.js";
import { fullRange, rangeInView } from "./store.js";
import { colours } from "./theme.js";
import { attachCursor, createTooltip } from "./tooltip.js";
import { attachZoom } from "./zoom.js";

const [RIGHT, TOP, GAP, BAND, AXIS] = [26, 34, 12, 20, 26];
/** Share of the visible steps that must be recorded for a line through all of them. */
const COVERED = 0.9;

const KEY = [
  "↶ rolled back, the steps were run again",
  "× NaN or Inf",
  "faint: undone, rejected, or recorded only around an incident",
].join(" · ");

const PANELS = [
  { title: "loss", height: 120, lines: [["loss", "loss"]], switched: true },
  {
    title: "gradient norm",
    height: 120,
    lines: [["grad_norm", "norm"], ["clip_threshold", "clip", [5, 3], "clip threshold"]],
    switched: true,
  },
  {
    title: "learning rate",
    height: 72,
    lines: [
      ["learning_rate", "rate", [], "applied"],
      ["scheduled_rate", "clip", [5, 3], "scheduled"],
    ],
    switched: true,
  },
  { title: "update / weight", height: 64, lines: [["update_ratio", "update"]], switched: true },
];

/** @returns {HTMLElement} the section, which is updated when the store changes. */
export function createTimeline(store) {
  const layers = layeredCanvas(
    "Time line by step. Plus and minus zoom, arrows pan, 0 shows all, Shift with arrows reads values.",
    () => draw(),
  );
  const tooltip = createTooltip(layers.element);
  let at = -1;
  const x = () =>
    linearScale(
      rangeInView(store.get()),
      [gutter(layers.width()), layers.width() - RIGHT],
      layers.width() / 110,
    );
  const draw = () => drawAll(store.get(), layers, x());
  const point = (i, py) => {
    at = i;
    showCursor(store.get(), layers, x(), tooltip, i, py);
  };

  attachZoom(layers.element, {
    x,
    range: () => rangeInView(store.get()),
    full: () => fullRange(store.get()),
    show: (range) => store.set({ range }),
    clamp: (px) => Math.min(Math.max(px, gutter(layers.width())), layers.width() - RIGHT),
    click: (px) => {
      const { incidents } = store.get();
      const found = pinAt(incidents, x(), rangeInView(store.get()), px);
      if (found) store.set({ incident: found.id });
    },
  });
  attachCursor(layers.element, {
    point: (px, py) => {
      const { course } = store.get();
      const inside = px >= gutter(layers.width()) - 8 && px <= layers.width() - RIGHT + 8;
      if (!course || course.at.length === 0 || !inside) return leave();
      return point(nearest(course.at, x().value(px)), py);
    },
    step: (by) => moveCursor(store.get(), at, by, (i) => point(i, TOP)),
    leave: () => leave(),
  });
  const leave = () => {
    at = -1;
    tooltip.hide();
    layers.beginCursor();
  };
  store.on(["course", "rival", "incidents", "incident", "range", "scale", "dark"], draw);
  return section("timeline", "Time line", controls(store), layers.element);
}

function controls(store) {
  const scale = choice(
    "Scale of the values",
    [["log", "log"], ["linear", "linear"]],
    store.get().scale,
    (value) => store.set({ scale: value }),
  );
  const all = button("Show all", () => store.set({ range: null }), { class: "show-all" });
  const follow = () => {
    scale.choose(store.get().scale);
    all.disabled = store.get().range === null;
  };
  store.on(["scale", "range"], follow);
  follow();
  return [scale, all, el("span", { class: "aside" }, KEY)];
}

function moveCursor({ course, range }, at, by, point) {
  if (!course || course.at.length === 0) return;
  const start = at >= 0 ? at : nearest(course.at, range ? range[0] : -Infinity) - by;
  point(Math.min(Math.max(start + by, 0), course.at.length - 1));
}

function drawAll(state, layers, x) {
  const { course, rival, incidents, incident, scale } = state;
  if (!course || course.at.length === 0) return;
  const { kept, others } = course;
  const isUsed = (field) =>
    [kept, others, rival?.course.kept].some((columns) => columns?.[field]?.some(Number.isFinite));
  const shown = PANELS.filter(({ lines }) => isUsed(lines[0][0]));
  const bands = BANDS.filter((band) => isVaried(kept, band));
  const bottom = TOP + shown.reduce((sum, each) => sum + each.height + GAP, 0) +
    bands.length * (BAND + 4);
  const context = layers.begin(bottom + AXIS);
  const palette = colours();
  const edges = [gutter(layers.width()), layers.width() - RIGHT];
  const view = { context, x, edges, palette, ...seriesOf(course, rival, rangeInView(state)) };
  drawLoops(context, course.loops, x, edges, TOP - 6, bottom, palette);
  let top = TOP;
  for (const panel of shown) {
    drawPanel(view, panel, top, panel.switched && scale === "log");
    top += panel.height + GAP;
  }
  for (const band of bands) {
    drawBandRow(view, kept, rangeInView(state), band, top);
    top += BAND + 4;
  }
  drawXAxis(view, bottom, "step");
  drawPins(context, incidents, incident, x, rangeInView(state), 13, bottom, palette);
}

/** A band that is the same all along says nothing, unless it names something, as a precision. */
const isVaried = (kept, { field, quiet }) =>
  kept[field]?.some((value) => Number.isFinite(value) && !quiet(value)) ?? false;

/**
 * Returns what to connect with a line, and what to draw as faint points.
 *
 * Around an incident every attempt is recorded, elsewhere one in many. A line through all of them would
 * look noisier there, so it is only drawn where most steps are recorded.
 */
function seriesOf(course, rival, range) {
  const [from, to] = within(course.kept, range).indices;
  const all = to - from > COVERED * (range[1] - range[0]);
  return {
    line: within(all ? course.kept : course.regular, range),
    faint: all ? null : within(course.dense, range),
    others: within(course.others, range),
    rival: rival && within(rival.course.regular, range),
  };
}

const within = (columns, range) => ({
  columns,
  indices: columns.length > 0 ? slice(columns.step, range, columns.length) : [0, 0],
});

function drawBandRow({ context, x, edges, palette }, kept, range, band, top) {
  context.textAlign = "left";
  context.fillStyle = palette.ink;
  context.fillText(band.title, 0, top + BAND / 2);
  context.fillStyle = palette.surface;
  context.fillRect(edges[0], top, edges[1] - edges[0], BAND);
  drawBand(context, band, kept, within(kept, range).indices, x, edges, top, BAND, palette);
}

function showCursor({ course, rival, incidents }, layers, x, tooltip, i, py) {
  const context = layers.beginCursor();
  const step = course.at[i];
  const at = x.px(step);
  vertical(context, at, TOP - 6, layers.element.clientHeight - AXIS, colours().ink);
  const [[columns, j], ...rest] = attemptsAt(course, step);
  const notesOf = (found, k) =>
    stepNotes(found, k, incidents, undoneBy(incidents, found.attempt[k]));
  const rows = withRival(stepRows(columns, j), step, rival);
  tooltip.show([at, py], stepTitle(columns, j), rows.rows, [
    ...notesOf(columns, j),
    ...rest.map(([found, k]) => attemptNote(found, k, notesOf(found, k))),
    ...rows.notes,
  ]);
}
