/** Elements from plain values. Text is always text: nothing here parses markup. */

/**
 * @param {string} tag
 * @param {object} [attributes] attributes by name; `on*` are listeners, `dataset` and `style` objects.
 * @param {...(Node|string|number|null|undefined|false)} children
 * @returns {HTMLElement}
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  element.append(...children.flat(Infinity).filter(isThere).map(asNode));
  return element;
}

/** Put children in place of those an element has. */
export function replace(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(isThere).map(asNode));
}

/** A dotted name as code, which is broken at its dots first. */
export function path(name, attributes = {}) {
  const parts = name.split(/(?<=[./\\])/);
  return el("code", attributes, parts.flatMap((part) => [part, el("wbr")]));
}

/** A sentence in which `names` between backticks are code. */
export function prose(text) {
  const parts = String(text ?? "").split(/`([^`]+)`/);
  return parts.map((part, i) => (i % 2 === 1 ? el("code", {}, part) : part));
}

/** A button that says what it does. */
export function button(label, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, label);
}

/** A choice between few options, as a row of buttons of which one is pressed. */
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

/** A section with a heading and controls next to it. */
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
