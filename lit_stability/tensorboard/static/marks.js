/** Marks incidents and undone attempts on charts with attempts on the x axis. */

import { hatch, mark, vertical } from "./canvas.js";
import { colourOf, markOf } from "./theme.js";

const SIZE = 7;
const REACH = 12;
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

/** Draws a pin with its number, and a vertical line, at each visible incident. */
export function drawPins(context, incidents, chosen, x, inside, y, bottom, colours) {
  const drawn = pins(incidents, x, inside);
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
  const near = pins(incidents, x, inside).map((pin) => ({ ...pin, off: Math.abs(pin.at - px) }));
  return near.filter((pin) => pin.off <= REACH).sort((a, b) => a.off - b.off)[0]?.incident;
}

function pins(incidents, x, inside) {
  return incidents
    .filter(({ attempt }) => attempt >= inside[0] && attempt <= inside[1])
    .map((incident) => ({ incident, at: x.px(incident.attempt) }));
}

/** Returns the incident whose rollback undid an attempt, or undefined. */
export function undoneBy(incidents, attempt) {
  return incidents.find((each) =>
    each.spans.some(([from, to]) => attempt >= from && attempt <= to)
  );
}
