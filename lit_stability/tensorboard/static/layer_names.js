/** Names next to the rows of the heat map; names of groups are buttons that fold them. */

import { button, el, replace } from "./dom.js";
import { nameInGroup } from "./layer_groups.js";
import { plural } from "./scales.js";

const [NAMED, MARGIN, SHARE, WIDE, LETTER] = [10, 8, 0.48, 200, 5.7];

/**
 * Places the names next to the rows. Elements that do not move are not changed: they keep the focus.
 *
 * @param {HTMLElement} place
 * @param {object} map
 * @param {{rows: object[], blocks: object[]}} map.laid  of `layOut`
 * @param {{names: string[]}} map.data
 * @param {number} map.left  available width; if it is small, only groups are named
 * @param {number} map.top   pixels above the first row
 * @param {(group: Group) => void} map.fold
 */
export function nameRows(place, map) {
  const { laid, left } = map;
  const key = [
    left,
    ...laid.blocks.flatMap(({ top, height, folded, group }) => [top, height, folded, group.name]),
  ].join();
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  const rows = left < WIDE
    ? []
    : laid.rows.filter(({ height, layers, group }) =>
      height >= NAMED && layers.length === 1 && group.layers.length > 1
    );
  const named = new Set(rows.map(({ group }) => group));
  replace(
    place,
    laid.blocks.map((block) => groupName(map, block, named.has(block.group))),
    rows.map((row) => layerName(map, row)),
  );
}

function groupName({ left, top, fold }, { top: at, height, group, folded }, narrow) {
  const width = narrow ? left * SHARE : left - MARGIN;
  const size = folded ? ` (${group.layers.length})` : "";
  const label = `${folded ? "▸" : "▾"} ${
    tail(group.name, width / LETTER - 2 - size.length)
  }${size}`;
  return button(label, () => fold(group), {
    class: "group-name",
    style: { top: `${top + at}px`, height: `${Math.min(height, 16)}px`, width: `${width}px` },
    "aria-expanded": String(!folded),
    "data-group": group.name,
    title: `${group.name}, ${plural(group.layers.length, "layer")}: click to ${
      folded ? "unfold" : "fold"
    }`,
  });
}

function layerName({ data, left, top }, { top: at, height, layers, group }) {
  const name = nameInGroup(data.names[layers[0]], group.name).replace(/\.weight$/, "");
  const width = left * (1 - SHARE) - MARGIN;
  const style = {
    top: `${top + at}px`,
    left: `${left * SHARE}px`,
    width: `${width}px`,
    lineHeight: `${height}px`,
  };
  return el("span", { class: "layer-name", style }, tail(name, width / LETTER));
}

/** Returns the end of a name, which is more specific than its beginning. */
const tail = (
  name,
  letters,
) => (name.length <= letters ? name : `…${name.slice(1 - Math.floor(letters))}`);
