/**
 * The heat map: the gradient norm of every layer at every step, relative to the rolling median of that
 * layer, at any zoom level. If there are several attempts at a step, the most extreme.
 *
 * Layers are grouped by the prefix of their names. A folded group shows its most extreme layer. The
 * x axis is that of the time line.
 */

import { gutter, layeredCanvas, mark, vertical } from "./canvas.js";
import { button, choice, el, replace, section } from "./dom.js";
import { encode, medianAt, NON_FINITE, severityOf, unusualness } from "./layer_codes.js";
import { groupLayers, layOut, unusualFirst } from "./layer_groups.js";
import { nameRows } from "./layer_names.js";
import { cells, paint } from "./layer_picture.js";
import { legend } from "./legend.js";
import { drawLoops, drawPins, pinAt } from "./marks.js";
import { count, linearScale, lowerBound, nearest, plural, ratio, short } from "./scales.js";
import { fullRange, rangeInView } from "./store.js";
import { colours } from "./theme.js";
import { attachCursor, createTooltip } from "./tooltip.js";
import { attachZoom } from "./zoom.js";

const [RIGHT, TOP, AXIS, HEIGHT] = [26, 42, 22, 460];
/** Rows above which the layers are folded at first, and the most unusual ones come first. */
const MANY = 60;
const ORDERS = { model: "model order", unusual: "most unusual first" };
const WORDS = { grad_norm: "gradient norm", update_ratio: "update-to-weight ratio" };

/** @returns {{element: HTMLElement, show: (layers: Layers|null, message?: Node) => void}} */
export function createHeatmap(store) {
  const layers = layeredCanvas(
    "Heat map of layers by step. Plus and minus zoom, arrows pan, 0 shows all, Shift with arrows reads values.",
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
    order: "model",
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
  const sortBy = (order) => {
    map.order = order;
    arrange(map);
    draw();
  };

  connect(store, map, layers, tooltip, x);
  store.on(["range", "incident", "incidents", "dark", "steps"], draw);
  const head = controls(store, foldAll, sortBy);
  return {
    element: section("heatmap", "Layers", head.elements, legend(), message, layers.element),
    show(data, text) {
      take(map, data);
      head.showOrder(map.order);
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
  map.data = there ? byStep(data) : null;
  map.coded = there ? encode(map.data) : null;
  if (!same) {
    const many = there && data.names.length > MANY;
    map.order = many ? "unusual" : "model";
    map.folded = new Set(many ? groupLayers(data.names).map(({ name }) => name) : []);
  }
  arrange(map);
}

/** Sorts the groups as chosen. */
function arrange(map) {
  const groups = map.data ? groupLayers(map.data.names) : [];
  map.groups = map.order === "unusual" && map.data
    ? unusualFirst(groups, unusualness(map.coded, map.data.names.length))
    : groups;
}

/** Sorts samples by step; of equal steps, the earlier attempt comes first. @returns {Layers} */
function byStep(data) {
  const { names, attempts, steps, values } = data;
  if (steps.every((step, i) => i === 0 || steps[i - 1] <= step)) return data;
  const order = Array.from(steps.keys()).sort((a, b) => steps[a] - steps[b] || a - b);
  const sorted = new Float32Array(values.length);
  const width = names.length;
  order.forEach((i, k) => sorted.set(values.subarray(i * width, (i + 1) * width), k * width));
  const by = (column) => Float64Array.from(order, (i) => column[i]);
  return { names, attempts: by(attempts), steps: by(steps), values: sorted };
}

function toggled(set, value) {
  const changed = new Set(set);
  if (!changed.delete(value)) changed.add(value);
  return changed;
}

function controls(store, foldAll, sortBy) {
  const quantity = choice(
    "Quantity",
    Object.entries(WORDS),
    store.get().quantity,
    (value) => store.set({ quantity: value }),
  );
  store.on(["quantity"], (state) => quantity.choose(state.quantity));
  const order = choice("Order", Object.entries(ORDERS), "model", (value) => {
    order.choose(value);
    sortBy(value);
  });
  const folding = [
    button("Fold all", () => foldAll(true)),
    button("Unfold all", () => foldAll(false)),
  ];
  return { elements: [quantity, order, ...folding], showOrder: order.choose };
}

function drawAll(state, map, layers, names, x, fold) {
  if (!map.data) return;
  map.laid = layOut(map.groups, map.folded, HEIGHT);
  const [left, right] = [gutter(layers.width()), layers.width() - RIGHT];
  const bottom = TOP + Math.ceil(map.laid.height);
  const context = layers.begin(bottom + AXIS);
  const palette = colours();
  const across = cells(map.data.steps, x, [left, right]);
  const size = [right - left, bottom - TOP];
  const { canvas, extremes } = paint(map.coded, map.laid.rows, across, size, palette);
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, left, TOP);
  if (state.course) {
    drawLoops(context, state.course.loops, x, [left, right], TOP - 15, TOP - 9, palette);
  }
  drawExtremes(context, extremes, left, palette);
  drawAxis(context, x, bottom, palette);
  drawPins(context, state.incidents, state.incident, x, rangeInView(state), 12, bottom, palette);
  nameRows(names, { ...map, left, top: TOP, fold });
  layers.element.dataset.drawn = state.quantity;
}

/** Marks the steps, above the map, at which any layer was not finite. */
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
  context.fillText("step", 0, bottom + 13);
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
      return show(nearest(map.data.steps, x().value(px)), py);
    },
    step: (by) => {
      if (!map.data) return;
      const start = map.at[0] >= 0
        ? map.at[0]
        : nearest(map.data.steps, rangeInView(store.get())[0]) - by;
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
  const [at, left] = [x.px(steps[i]), gutter(layers.width())];
  vertical(context, at, TOP - 20, layers.element.clientHeight - AXIS, colours().ink);
  if (!row) return tooltip.hide();
  context.strokeStyle = colours().accent;
  context.strokeRect(
    left + 0.5,
    TOP + row.top - 0.5,
    layers.width() - RIGHT - left,
    row.height + 1,
  );
  const [layer, k] = worst(map, row.layers, i);
  const value = values[k * names.length + layer];
  const median = medianAt(map.coded, layer, k);
  const rows = [
    ["value", short(value)],
    ["rolling median", short(median)],
    ...(value > 0 && Number.isFinite(value)
      ? [["ratio", ratio(value / median)]]
      : []),
    ["step", count(steps[k])],
    ["attempt", count(attempts[k])],
  ];
  return tooltip.show(
    [at, py],
    names[layer],
    rows,
    row.layers.length > 1 ? [`The most extreme of ${plural(row.layers.length, "layer")}`] : [],
  );
}

/** Returns the layer and the sample with the most extreme value at the step of sample `i`. */
function worst({ coded, data: { steps } }, layers, i) {
  let found = [layers[0], i];
  const severity = ([layer, k]) => severityOf(coded.codes[layer * coded.samples + k]);
  for (let k = lowerBound(steps, steps[i]); steps[k] === steps[i]; k++) {
    for (const layer of layers) {
      if (severity([layer, k]) > severity(found)) found = [layer, k];
    }
  }
  return found;
}
