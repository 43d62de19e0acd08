/**
 * The page around this one: TensorBoard's window, in whose iframe we are drawn.
 *
 * Three things come from it: whether it is dark, the part of its address that is ours
 * (`#stability&p.stability.run=NAME`), and the news that data was loaded again. Where there is no
 * such window, or it is not ours to read, the page stands alone.
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

/** Whether to draw light on dark: as the host does, alone as the system does. */
export function isDark() {
  return host === window ? prefersDark.matches : host.document.body.classList.contains("dark-mode");
}

/** Call `listener` whenever `isDark` may have changed. */
export function onThemeChange(listener) {
  prefersDark.addEventListener("change", listener);
  if (host === window) return;
  const observer = new MutationObserver(listener);
  observer.observe(host.document.body, { attributes: true, attributeFilter: ["class"] });
}

/** @returns {Record<string, string>} What the address says to this page: run, incident, and so on. */
export function readAddress() {
  const found = {};
  for (const part of partsOfHash()) {
    const [key, ...value] = part.split("=");
    if (key.startsWith(MINE)) found[key.slice(MINE.length)] = decode(value.join("="));
  }
  return found;
}

/**
 * Write values into the address, so that it can be shared; empty ones are omitted.
 *
 * @param {object} values
 * @param {boolean} leave  whether the browser's back button is to return to what was shown before
 */
export function writeAddress(values, leave) {
  const others = partsOfHash().filter((part) => !part.startsWith(MINE));
  if (host !== window && others[0] !== PLUGIN) return; // another tab is in front
  const mine = Object.entries(values)
    .filter(([, value]) => value !== "" && value !== null && value !== undefined)
    .map(([key, value]) => `${MINE}${key}=${encodeURIComponent(value)}`);
  const hash = `#${[...others, ...mine].join("&")}`;
  if (hash === host.location.hash) return;
  const { history } = host;
  if (leave) history.pushState(history.state, "", hash);
  else history.replaceState(history.state, "", hash);
}

/** Call `listener` when somebody follows another link into this page. */
export function onAddressChange(listener) {
  host.addEventListener("hashchange", listener);
  window.addEventListener("pagehide", () => host.removeEventListener("hashchange", listener));
}

/** Call `listener` whenever TensorBoard has reloaded its data. */
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
