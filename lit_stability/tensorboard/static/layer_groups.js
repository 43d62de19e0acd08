/** Groups layers by the prefix of their names. Draws nothing. */

/**
 * @typedef {{name: string, layers: number[]}} Group
 *   `layers` are indices into the list of names.
 */

/**
 * Groups names by block: the part up to the first number, otherwise the first parts.
 *
 * The prefix that all names share is omitted, except for the word before a number. For example,
 * `network.encoder.layers.0.norm.weight` belongs to the group `encoder.layers.0`.
 *
 * @param {string[]} names
 * @returns {Group[]} in the order of their first layers
 */
export function groupLayers(names) {
  const parts = names.map((name) => name.split("."));
  const common = commonLength(parts);
  const groups = new Map();
  parts.forEach((each, i) => {
    const name = groupName(each.slice(common));
    if (!groups.has(name)) groups.set(name, { name, layers: [] });
    groups.get(name).layers.push(i);
  });
  return [...groups.values()];
}

/**
 * Returns the groups with the most unusual layers first, and so the layers in each of them.
 *
 * @param {Group[]} groups
 * @param {Float64Array} scores  of each layer
 */
export function unusualFirst(groups, scores) {
  const highest = ({ layers }) => Math.max(...layers.map((layer) => scores[layer]));
  return groups
    .map((group) => ({ ...group, layers: [...group.layers].sort((a, b) => scores[b] - scores[a]) }))
    .sort((a, b) => highest(b) - highest(a));
}

/** Returns the name of a layer without the name of its group. */
export function nameInGroup(name, group) {
  const at = name.indexOf(`${group}.`);
  return at >= 0 ? name.slice(at + group.length + 1) : name;
}

function groupName(parts) {
  const number = parts.findIndex(isNumber);
  if (number >= 0) return parts.slice(0, number + 1).join(".");
  return parts.length > 1 ? parts.slice(0, -1).slice(0, 2).join(".") : parts[0];
}

const isNumber = (part) => /^\d+$/.test(part);

function commonLength(parts) {
  if (parts.length < 2) return 0;
  const shortest = Math.min(...parts.map((each) => each.length - 1));
  let length = 0;
  while (length < shortest && parts.every((each) => each[length] === parts[0][length])) length += 1;
  return length > 0 && parts.some((each) => isNumber(each[length])) ? length - 1 : length;
}

/**
 * Returns the position of each row: a folded group has one row, an open group one per layer.
 *
 * @param {Group[]} groups
 * @param {Set<string>} folded  names of folded groups
 * @param {number} height       pixels for all layers of open groups together
 * @returns {{rows: {top: number, height: number, layers: number[], group: Group}[],
 *   blocks: {top: number, height: number, group: Group, folded: boolean}[], height: number}}
 */
export function layOut(groups, folded, height) {
  const open = groups.filter((group) => !folded.has(group.name));
  const layers = open.reduce((sum, group) => sum + group.layers.length, 0);
  const left = height - (groups.length - open.length) * (BLOCK + SEAM) - open.length * SEAM;
  const each = Math.min(ROW, Math.max(2, Math.floor(left / Math.max(1, layers))));
  const laid = { rows: [], blocks: [], height: 0 };
  for (const group of groups) addBlock(laid, group, folded.has(group.name), each);
  return laid;
}

const [BLOCK, SEAM, ROW] = [16, 2, 15];

function addBlock(laid, group, folded, each) {
  const top = laid.height;
  const rows = folded ? [group.layers] : group.layers.map((layer) => [layer]);
  const row = Math.max(folded ? BLOCK : each, BLOCK / rows.length);
  rows.forEach((layers, i) => laid.rows.push({ top: top + i * row, height: row, layers, group }));
  laid.blocks.push({ top, height: rows.length * row, group, folded });
  laid.height = top + rows.length * row + SEAM;
}
