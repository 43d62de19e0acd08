/** Marks incidents and what rollbacks undid, on charts with steps or attempts on the x axis. */

import { hatch, mark, vertical } from "./canvas.js";
import { colourOf, markOf } from "./theme.js";

const SIZE = 7;
const REACH = 12;
const ARROW = 12; // shortest loop that is drawn
const CROWDED = 30; // pixels to the next pin below which a number does not fit

/** Shades the attempts that rollbacks undid. */
export function drawSpans(context, incidents, x, [left, right], top, bottom, colours) {
  for (const [from, to] of incidents.flatMap((each) => each.spans)) {
    const start = Math.max(left, x.px(from - 0.5));
    const width = Math.max(2, Math.min(right, x.px(to + 0.5)) - start);
    if (x.px(to) < left || x.px(from) > right) continue;
    context.fillStyle = colours.shade;
    context.fillRect(start, top, width, bottom - top);
    hatch(context, start, top, width, bottom - top, colours.hatch);
  }
}

/**
 * Draws rollbacks on an axis of steps as loops: an arrow from where the run was back to where it went
 * on from, above the steps that were run again.
 */
export function drawLoops(context, loops, x, [left, right], y, bottom, colours) {
  context.save();
  context.beginPath();
  context.rect(left, 0, right - left, bottom);
  context.clip();
  for (const { from, to } of loops) {
    const [start, end] = [x.px(from), Math.max(x.px(to), x.px(from) + ARROW)];
    context.fillStyle = colours.shade;
    context.fillRect(start, y, end - start, bottom - y);
    context.strokeStyle = context.fillStyle = colours.muted;
    context.beginPath();
    context.moveTo(end, y + 5);
    context.arc(end - 2.5, y + 2.5, 2.5, Math.PI / 2, -Math.PI / 2, true);
    context.lineTo(start + 4, y);
    context.stroke();
    context.beginPath();
    context.moveTo(start, y);
    context.lineTo(start + 6, y - 4);
    context.lineTo(start + 6, y + 4);
    context.fill();
  }
  context.restore();
}

/**
 * Draws a pin with its number, and a vertical line, at each visible incident.
 *
 * @param {string} axis  field of an incident that is its place on the x axis: "step" or "attempt"
 */
export function drawPins(context, incidents, chosen, x, inside, y, bottom, colours, axis = "step") {
  const drawn = pins(incidents, x, inside, axis);
  drawn.forEach(({ incident, at }, i) => {
    const mine = incident.id === chosen;
    const colour = colours[colourOf(incident.outcome)];
    vertical(context, at, y, bottom, mine ? colours.accent : colour, mine ? [] : [3, 3]);
    mark(context, markOf(incident.outcome).shape, at, y, SIZE, colour);
    if (mine) ring(context, at, y, colours.accent);
    if (!mine && drawn[i + 1]?.at - at < CROWDED) return;
    context.fillStyle = colours.ink;
    context.textAlign = "left";
    context.fillText(String(incident.id), at + SIZE + (mine ? 6 : 3), y);
  });
}

function ring(context, x, y, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.beginPath();
  context.arc(x, y, SIZE + 3, 0, 2 * Math.PI);
  context.stroke();
  context.lineWidth = 1;
}

/** Returns the incident whose pin or line is near a pixel, or undefined. */
export function pinAt(incidents, x, inside, px) {
  const near = pins(incidents, x, inside, "step").map((pin) => ({ ...pin, off: Math.abs(pin.at - px) }));
  return near.filter((pin) => pin.off <= REACH).sort((a, b) => a.off - b.off)[0]?.incident;
}

function pins(incidents, x, inside, axis) {
  return incidents
    .filter(({ [axis]: value }) => value >= inside[0] && value <= inside[1])
    .map((incident) => ({ incident, at: x.px(incident[axis]) }))
    .sort((a, b) => a.at - b.at);
}

/** Returns the incident whose rollback undid an attempt, or undefined. */
export function undoneBy(incidents, attempt) {
  return incidents.find((each) =>
    each.spans.some(([from, to]) => attempt >= from && attempt <= to)
  );
}
