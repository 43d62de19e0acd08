/** Creates elements from plain values. Strings become text nodes and are never parsed as HTML. */

/**
 * @param {string} tag
 * @param {object} [attributes] attributes by name; `on*` are listeners, `dataset` and `style` are objects.
 * @param {...(Node|string|number|null|undefined|false)} children
 * @returns {HTMLElement}
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  element.append(...children.flat(Infinity).filter(isThere).map(asNode));
  return element;
}

/** Replaces the children of an element. */
export function replace(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(isThere).map(asNode));
}

/** Creates a code element for a dotted name; lines break after dots. */
export function path(name, attributes = {}) {
  const parts = name.split(/(?<=[./\\])/);
  return el("code", attributes, parts.flatMap((part) => [part, el("wbr")]));
}

/** Splits a sentence into text and code elements; code is between backticks. */
export function prose(text) {
  const parts = String(text ?? "").split(/`([^`]+)`/);
  return parts.map((part, i) => (i % 2 === 1 ? el("code", {}, part) : part));
}

/** Creates a button with a label. */
export function button(label, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, label);
}

/** Creates a row of buttons of which one is pressed. */
export function choice(label, options, chosen, onchoose) {
  const group = el("div", { class: "choice", role: "group", "aria-label": label });
  const buttons = options.map(([value, text]) =>
    button(text, () => onchoose(value), {
      "aria-pressed": String(value === chosen),
      "data-value": value,
    })
  );
  group.append(...buttons);
  group.choose = (value) =>
    buttons.forEach((each) =>
      each.setAttribute("aria-pressed", String(each.dataset.value === value))
    );
  return group;
}

/** Creates a section with a heading and controls next to it. */
export function section(name, title, controls, ...content) {
  const heading = el("h2", { id: `${name}-title` }, title);
  const head = el("div", { class: "section-head" }, heading, ...controls);
  return el("section", { class: name, "aria-labelledby": `${name}-title` }, head, ...content);
}

function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
  else if (name === "dataset" || name === "style") Object.assign(element[name], value);
  else element.setAttribute(name, value === true ? "" : value);
}

const isThere = (child) => child !== null && child !== undefined && child !== false;
const asNode = (child) => (child instanceof Node ? child : document.createTextNode(String(child)));
