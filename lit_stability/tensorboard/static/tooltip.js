/** A tooltip with the values at the pointer; screen readers read it after keyboard moves. */

import { el, replace } from "./dom.js";

const OFFSET = 14;

/** Creates a box in `place` that shows rows of names and values. */
export function createTooltip(place) {
  const box = el("div", { class: "tooltip", role: "status", hidden: true });
  place.append(box);
  return {
    element: box,
    /**
     * @param {[number, number]} at  pixel in `place`
     * @param {string} title
     * @param {[string, string][]} rows
     * @param {string[]} [notes]
     */
    show([x, y], title, rows, notes = []) {
      replace(
        box,
        el("strong", {}, title),
        el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
        notes.map((note) => el("p", {}, note)),
      );
      box.hidden = false;
      put(box, place, x, y);
    },
    hide() {
      box.hidden = true;
    },
  };
}

function put(box, place, x, y) {
  const right = x + OFFSET + box.offsetWidth < place.clientWidth;
  const left = right ? x + OFFSET : Math.max(0, x - OFFSET - box.offsetWidth);
  const top = Math.min(Math.max(0, y + OFFSET), Math.max(0, place.clientHeight - box.offsetHeight));
  Object.assign(box.style, { left: `${left}px`, top: `${top}px` });
}

/**
 * Moves a cursor along samples with the pointer, or with Shift and the arrow keys.
 *
 * @param {HTMLElement} element
 * @param {object} cursor
 * @param {(px: number, py: number) => void} cursor.point
 * @param {(by: number) => void} cursor.step
 * @param {() => void} cursor.leave
 */
export function attachCursor(element, cursor) {
  element.addEventListener("pointermove", (event) => {
    const box = element.getBoundingClientRect();
    cursor.point(event.clientX - box.left, event.clientY - box.top);
  });
  element.addEventListener("pointerleave", cursor.leave);
  element.addEventListener("blur", cursor.leave);
  element.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!event.shiftKey || by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    cursor.step(by);
  });
}
