/** A canvas that fills its container, sharp on every screen, with a second canvas for the cursor. */

import { el } from "./dom.js";

export const FONT = "11px Roboto, system-ui, sans-serif";

/** Left margin in pixels, the same for all charts over attempts, so that they are aligned. */
export const gutter = (width) => (width > 900 ? 236 : 160);

/**
 * Creates two stacked canvases: one for the chart, one for the cursor.
 *
 * @param {string} label  description of the chart for screen readers
 * @param {() => void} redraw  called when the width changes
 */
export function layeredCanvas(label, redraw) {
  const picture = el("canvas", { "aria-hidden": "true" });
  const cursor = el("canvas", { "aria-hidden": "true", class: "cursor" });
  const element = el(
    "div",
    { class: "plot", tabindex: "0", role: "application", "aria-label": label },
    picture,
    cursor,
  );
  let width = 0;
  new ResizeObserver(() => {
    if (Math.round(element.clientWidth) === width) return;
    width = Math.round(element.clientWidth);
    redraw();
  }).observe(element);
  return {
    element,
    width: () => Math.max(320, Math.round(element.clientWidth)),
    /** Clears both canvases and sets their height, in CSS pixels. */
    begin: (height) => {
      element.style.height = `${height}px`;
      begin(cursor, element.clientWidth, height);
      return begin(picture, element.clientWidth, height);
    },
    /** Clears the canvas of the cursor. */
    beginCursor: () => begin(cursor, element.clientWidth, element.clientHeight),
  };
}

function begin(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * density), Math.round(height * density)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = FONT;
  context.textBaseline = "middle";
  return context;
}

/** Draws a vertical line of exactly one pixel. */
export function vertical(context, x, top, bottom, colour, dash = []) {
  context.save();
  context.strokeStyle = colour;
  context.setLineDash(dash);
  context.beginPath();
  context.moveTo(Math.round(x) + 0.5, top);
  context.lineTo(Math.round(x) + 0.5, bottom);
  context.stroke();
  context.restore();
}

/** Draws the mark of an outcome. */
export function mark(context, shape, x, y, size, colour) {
  context.beginPath();
  if (shape === "square") context.rect(x - size, y - size, 2 * size, 2 * size);
  else if (shape === "triangle") {
    polygon(context, [[x, y - size], [x + size, y + size], [x - size, y + size]]);
  } else if (shape === "diamond") {
    polygon(context, [[x, y - size], [x + size, y], [x, y + size], [x - size, y]]);
  } else context.arc(x, y, size, 0, 2 * Math.PI);
  context.lineWidth = 2;
  context.fillStyle = context.strokeStyle = colour;
  if (shape === "ring") context.stroke();
  else context.fill();
  context.lineWidth = 1;
}

function polygon(context, points) {
  points.forEach(([x, y], i) => (i === 0 ? context.moveTo(x, y) : context.lineTo(x, y)));
  context.closePath();
}

/** Hatches a rectangle with diagonal lines, which are visible on any colour. */
export function hatch(context, x, y, width, height, colour, gap = 6) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = colour;
  context.beginPath();
  for (let start = x - height - ((x - height) % gap); start < x + width; start += gap) {
    context.moveTo(start, y + height);
    context.lineTo(start + height, y);
  }
  context.stroke();
  context.restore();
}
