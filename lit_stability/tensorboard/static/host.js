/**
 * Access to TensorBoard's window, which shows this page in an iframe.
 *
 * Three things are read from it: whether dark mode is on, the parameters of this page in its address
 * (`#stability&p.stability.run=NAME`), and the message that data were reloaded. Without such a
 * window, or without access to it, the page works alone.
 */

const PLUGIN = "stability";
const MINE = `p.${PLUGIN}.`;

function hostWindow() {
  try {
    return window.parent.document.body ? window.parent : window;
  } catch {
    return window;
  }
}

const host = hostWindow();
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");

/** Returns whether dark mode is on in TensorBoard; for a page alone, in the system. */
export function isDark() {
  return host === window ? prefersDark.matches : host.document.body.classList.contains("dark-mode");
}

/** Calls `listener` whenever `isDark` may have changed. */
export function onThemeChange(listener) {
  prefersDark.addEventListener("change", listener);
  if (host === window) return;
  const observer = new MutationObserver(listener);
  observer.observe(host.document.body, { attributes: true, attributeFilter: ["class"] });
}

/** @returns {Record<string, string>} parameters of this page in the address: run, incident, ... */
export function readAddress() {
  const found = {};
  for (const part of partsOfHash()) {
    const [key, ...value] = part.split("=");
    if (key.startsWith(MINE)) found[key.slice(MINE.length)] = decode(value.join("="));
  }
  return found;
}

/**
 * Writes values to the address, so that it can be shared; empty values are omitted.
 *
 * @param {object} values
 * @param {boolean} leave  whether to add an entry to the browser's history
 */
export function writeAddress(values, leave) {
  const others = partsOfHash().filter((part) => !part.startsWith(MINE));
  if (host !== window && others[0] !== PLUGIN) return; // another tab is active
  const mine = Object.entries(values)
    .filter(([, value]) => value !== "" && value !== null && value !== undefined)
    .map(([key, value]) => `${MINE}${key}=${encodeURIComponent(value)}`);
  const hash = `#${[...others, ...mine].join("&")}`;
  if (hash === host.location.hash) return;
  const { history } = host;
  if (leave) history.pushState(history.state, "", hash);
  else history.replaceState(history.state, "", hash);
}

/** Calls `listener` when the user follows another link to this page. */
export function onAddressChange(listener) {
  host.addEventListener("hashchange", listener);
  window.addEventListener("pagehide", () => host.removeEventListener("hashchange", listener));
}

/** Calls `listener` whenever TensorBoard has reloaded its data. */
export function onDataReloaded(listener) {
  if (window.parent === window) return;
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.isReply) return;
    port1.postMessage(JSON.stringify({ ...message, payload: null, error: null, isReply: true }));
    if (message.type === "experimental.DataReloaded") listener();
  };
  window.parent.postMessage("experimental.bootstrap", "*", [port2]);
}

function partsOfHash() {
  return host.location.hash.slice(1).split("&").filter(Boolean);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
