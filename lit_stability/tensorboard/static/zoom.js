/**
 * Zooming and panning along the steps, the same in every chart.
 *
 * Drag to zoom into a range, use the wheel with Ctrl or Alt to zoom at the pointer, double-click to
 * show all. When the chart has the focus: + and - zoom, arrow keys pan, 0 shows all.
 */

import { el } from "./dom.js";

const MIN_SPAN = 4;
const DRAGGED = 4;

/** @returns {[number, number]} the range scaled by a factor around `centre`, within `full`. */
export function zoomed([low, high], factor, centre, full) {
  const span = Math.min(Math.max((high - low) * factor, MIN_SPAN), full[1] - full[0]);
  return within(centre - (span * (centre - low)) / (high - low), span, full);
}

/** @returns {[number, number]} the range moved by a share of its length, within `full`. */
export function panned([low, high], share, full) {
  return within(low + (high - low) * share, high - low, full);
}

function within(low, span, full) {
  const start = Math.min(Math.max(low, full[0]), full[1] - span);
  return [start, start + span];
}

/**
 * @param {HTMLElement} element
 * @param {object} view
 * @param {() => Scale} view.x
 * @param {() => [number, number]} view.range
 * @param {() => [number, number]} view.full
 * @param {(range: [number, number]|null) => void} view.show
 * @param {(px: number, event: PointerEvent) => void} view.click
 * @param {(px: number) => number} view.clamp  pixel limited to the chart
 */
export function attachZoom(element, view) {
  const rubber = el("div", { class: "rubber", hidden: true });
  const hint = el(
    "div",
    { class: "hint", role: "status", hidden: true },
    "Hold Ctrl or Alt to zoom with the wheel; drag works too",
  );
  element.append(rubber, hint);
  attachDrag(element, rubber, view);
  attachWheel(element, hint, view);
  element.addEventListener("dblclick", (event) => {
    if (!event.target.closest("button")) view.show(null);
  });
  element.addEventListener("keydown", (event) => onKey(event, view));
}

function attachDrag(element, rubber, view) {
  let start = null;
  const px = (event) => view.clamp(event.clientX - element.getBoundingClientRect().left);
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.target.closest("button")) return;
    start = px(event);
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const [left, right] = [start, px(event)].sort((a, b) => a - b);
    rubber.hidden = right - left < DRAGGED;
    Object.assign(rubber.style, { left: `${left}px`, width: `${right - left}px` });
  });
  element.addEventListener("pointerup", (event) => {
    if (start === null) return;
    const [left, right] = [start, px(event)].sort((a, b) => a - b);
    start = null;
    rubber.hidden = true;
    if (right - left < DRAGGED) view.click(right, event);
    else view.show(atLeast([view.x().value(left), view.x().value(right)], view.full()));
  });
  element.addEventListener("pointercancel", () => {
    start = null;
    rubber.hidden = true;
  });
}

function atLeast(range, full) {
  return zoomed(
    range,
    Math.max(1, MIN_SPAN / (range[1] - range[0])),
    (range[0] + range[1]) / 2,
    full,
  );
}

function attachWheel(element, hint, view) {
  let timer = 0;
  element.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.altKey && !event.metaKey) {
      hint.hidden = false;
      clearTimeout(timer);
      timer = setTimeout(() => (hint.hidden = true), 1200);
      return;
    }
    event.preventDefault();
    const px = view.clamp(event.clientX - element.getBoundingClientRect().left);
    const factor = Math.exp(Math.sign(event.deltaY) * Math.min(Math.abs(event.deltaY) / 300, 0.6));
    view.show(zoomed(view.range(), factor, view.x().value(px), view.full()));
  }, { passive: false });
}

function onKey(event, view) {
  if (event.shiftKey && event.key.startsWith("Arrow")) return;
  const range = view.range();
  const middle = (range[0] + range[1]) / 2;
  const moves = {
    "+": () => zoomed(range, 0.5, middle, view.full()),
    "=": () => zoomed(range, 0.5, middle, view.full()),
    "-": () => zoomed(range, 2, middle, view.full()),
    ArrowLeft: () => panned(range, -0.2, view.full()),
    ArrowRight: () => panned(range, 0.2, view.full()),
    0: () => null,
    Home: () => null,
  };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  event.stopPropagation();
  view.show(moves[event.key]());
}
