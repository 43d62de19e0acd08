/**
 * The heat map: the gradient norm of every layer at every attempt, relative to the median of that
 * layer over the whole run, at any zoom level.
 *
 * Layers are grouped by the prefix of their names. A folded group shows its most extreme layer. The
 * x axis is that of the time line.
 */

import { gutter, layeredCanvas, mark, vertical } from "./canvas.js";
import { button, choice, el, replace, section } from "./dom.js";
import { encode, NON_FINITE, severityOf } from "./layer_codes.js";
import { groupLayers, layOut } from "./layer_groups.js";
import { nameRows } from "./layer_names.js";
import { cells, paint } from "./layer_picture.js";
import { legend } from "./legend.js";
import { drawPins, drawSpans, pinAt } from "./marks.js";
import { count, linearScale, nearest, plural, ratio, short } from "./scales.js";
import { fullRange, rangeInView } from "./store.js";
import { colours } from "./theme.js";
import { attachCursor, createTooltip } from "./tooltip.js";
import { attachZoom } from "./zoom.js";

const [RIGHT, TOP, AXIS, HEIGHT] = [26, 42, 22, 460];
const WORDS = { grad_norm: "gradient norm", update_ratio: "update-to-weight ratio" };

/** @returns {{element: HTMLElement, show: (layers: Layers|null, message?: Node) => void}} */
export function createHeatmap(store) {
  const layers = layeredCanvas(
    "Heat map of layers by attempt. Plus and minus zoom, arrows pan, 0 shows all, Shift with arrows reads values.",
    () => draw(),
  );
  const names = el("div", { class: "layer-names" });
  layers.element.append(names);
  const tooltip = createTooltip(layers.element);
  const message = el("div", { class: "message" });
  const map = {
    data: null,
    coded: null,
    groups: [],
    folded: new Set(),
    laid: layOut([], new Set(), HEIGHT),
    at: [-1, 0],
  };
  const x = () =>
    linearScale(
      rangeInView(store.get()),
      [gutter(layers.width()), layers.width() - RIGHT],
      layers.width() / 110,
    );
  const draw = () => drawAll(store.get(), map, layers, names, x(), fold);
  const fold = (group) => {
    map.folded = toggled(map.folded, group.name);
    draw();
    names.querySelector(`[data-group="${CSS.escape(group.name)}"]`)?.focus();
  };
  const foldAll = (all) => {
    map.folded = new Set(all ? map.groups.map(({ name }) => name) : []);
    draw();
  };

  connect(store, map, layers, tooltip, x);
  store.on(["range", "incident", "incidents", "dark", "steps"], draw);
  const head = controls(store, foldAll);
  return {
    element: section("heatmap", "Layers", head, legend(), message, layers.element),
    show(data, text) {
      take(map, data);
      replace(message, text);
      message.hidden = !text;
      layers.element.hidden = !map.data;
      draw();
    },
  };
}

function take(map, data) {
  const there = data && data.names.length > 0 && data.attempts.length > 0;
  const same = there && map.data && data.names.join() === map.data.names.join();
  map.data = there ? data : null;
  map.coded = there ? encode(data) : null;
  map.groups = there ? groupLayers(data.names) : [];
  if (!same) map.folded = new Set();
}

function toggled(set, value) {
  const changed = new Set(set);
  if (!changed.delete(value)) changed.add(value);
  return changed;
}

function controls(store, foldAll) {
  const quantity = choice(
    "Quantity",
    Object.entries(WORDS),
    store.get().quantity,
    (value) => store.set({ quantity: value }),
  );
  store.on(["quantity"], (state) => quantity.choose(state.quantity));
  return [
    quantity,
    button("Fold all", () => foldAll(true)),
    button("Unfold all", () => foldAll(false)),
  ];
}

function drawAll(state, map, layers, names, x, fold) {
  if (!map.data) return;
  map.laid = layOut(map.groups, map.folded, HEIGHT);
  const [left, right] = [gutter(layers.width()), layers.width() - RIGHT];
  const bottom = TOP + Math.ceil(map.laid.height);
  const context = layers.begin(bottom + AXIS);
  const palette = colours();
  const across = cells(map.data.attempts, x, [left, right]);
  const size = [right - left, bottom - TOP];
  const { canvas, extremes } = paint(map.coded, map.laid.rows, across, size, palette);
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, left, TOP);
  drawSpans(context, state.incidents, x, [left, right], TOP - 18, TOP - 12, palette);
  drawExtremes(context, extremes, left, palette);
  drawAxis(context, x, bottom, palette);
  drawPins(context, state.incidents, state.incident, x, rangeInView(state), 12, bottom, palette);
  nameRows(names, { ...map, left, top: TOP, fold });
  layers.element.dataset.drawn = state.quantity;
}

/** Marks the attempts, above the map, at which any layer was not finite. */
function drawExtremes(context, extremes, left, palette) {
  let start = -1;
  for (let c = 0; c <= extremes.length; c++) {
    const bad = extremes[c] === NON_FINITE;
    if (bad && start < 0) start = c;
    if (bad || start < 0) continue;
    mark(context, "triangle", left + (start + c) / 2, TOP - 5, -3.5, palette.bad);
    start = -1;
  }
}

function drawAxis(context, x, bottom, palette) {
  context.fillStyle = palette.muted;
  context.textAlign = "center";
  for (const tick of x.ticks.filter(Number.isInteger)) {
    vertical(context, x.px(tick), bottom - 2, bottom + 3, palette.line);
    context.fillText(count(tick), x.px(tick), bottom + 13);
  }
  context.textAlign = "left";
  context.fillText("attempt", 0, bottom + 13);
}

function connect(store, map, layers, tooltip, x) {
  const leave = () => {
    map.at = [-1, 0];
    tooltip.hide();
    layers.beginCursor();
  };
  const show = (i, py) => {
    map.at = [i, py];
    showCursor(map, layers, x(), tooltip, i, py);
  };
  attachZoom(layers.element, {
    x,
    range: () => rangeInView(store.get()),
    full: () => fullRange(store.get()),
    show: (range) => store.set({ range }),
    clamp: (px) => Math.min(Math.max(px, gutter(layers.width())), layers.width() - RIGHT),
    click: (px, event) => {
      const found = pinAt(store.get().incidents, x(), rangeInView(store.get()), px);
      if (
        found &&
        event.clientX - layers.element.getBoundingClientRect().left >= gutter(layers.width())
      ) store.set({ incident: found.id });
    },
  });
  attachCursor(layers.element, {
    point: (px, py) => {
      if (!map.data || px < gutter(layers.width()) || px > layers.width() - RIGHT || py < TOP) {
        return leave();
      }
      return show(nearest(map.data.attempts, x().value(px)), py);
    },
    step: (by) => {
      if (!map.data) return;
      const start = map.at[0] >= 0
        ? map.at[0]
        : nearest(map.data.attempts, rangeInView(store.get())[0]) - by;
      show(
        Math.min(Math.max(start + by, 0), map.data.attempts.length - 1),
        Math.max(map.at[1], TOP + 1),
      );
    },
    leave,
  });
}

function showCursor(map, layers, x, tooltip, i, py) {
  const row = map.laid.rows.find(({ top, height }) => py - TOP >= top && py - TOP < top + height);
  const { names, attempts, steps, values } = map.data;
  const context = layers.beginCursor();
  const [at, left] = [x.px(attempts[i]), gutter(layers.width())];
  vertical(context, at, TOP - 20, layers.element.clientHeight - AXIS, colours().ink);
  if (!row) return tooltip.hide();
  context.strokeStyle = colours().accent;
  context.strokeRect(
    left + 0.5,
    TOP + row.top - 0.5,
    layers.width() - RIGHT - left,
    row.height + 1,
  );
  const layer = worst(map, row.layers, i);
  const value = values[i * names.length + layer];
  const rows = [
    ["value", short(value)],
    ["median of the run", short(map.coded.medians[layer])],
    ...(value > 0 && Number.isFinite(value)
      ? [["ratio", ratio(value / map.coded.medians[layer])]]
      : []),
    ["attempt", count(attempts[i])],
    ["step", count(steps[i])],
  ];
  return tooltip.show(
    [at, py],
    names[layer],
    rows,
    row.layers.length > 1 ? [`The most extreme of ${plural(row.layers.length, "layer")}`] : [],
  );
}

/** Returns the layer with the most extreme value at sample `i`. */
function worst({ coded }, layers, i) {
  const severity = (layer) => severityOf(coded.codes[layer * coded.samples + i]);
  return layers.reduce((found, layer) => (severity(layer) > severity(found) ? layer : found));
}
