"""A server that stands in for TensorBoard: a host window, the plugin's frame, and its data.

The frame is made as TensorBoard makes it: one inline import, which the same content security policy
allows and nothing else inline.
"""

import base64
import hashlib
import json
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

import lit_stability
from lit_stability.incidents.verdict import verdict_of
from tests.tensorboard.page_incidents import same_sample, three_incidents
from tests.tensorboard.page_runs import (
    MARKUP,
    incident,
    layers_of,
    plain,
    run_layers,
    run_rows,
    steps_of,
    two_optimizers,
)

STATIC = Path(lit_stability.__file__).parent / "tensorboard" / "static"
TYPES = {".js": "text/javascript", ".css": "text/css"}
SCRIPT = 'import("./static/index.js").then((m) => void m.render());'
DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'self'; frame-src 'self'; object-src 'none'; connect-src 'self'; "
    "img-src 'self' data: blob:; style-src 'self' data: 'unsafe-inline'; "
    f"script-src 'self' 'unsafe-eval' 'sha256-{DIGEST}'"
)
FRAME = f"""
<!DOCTYPE html>
<head><base href="plugin/stability/" /></head>
<body><script type="module">{SCRIPT}</script></body>
"""
HOST = """<!DOCTYPE html>
<html><head><title>host</title><link rel="icon" href="data:,"><style>
html, body { height: 100%; margin: 0 }
iframe { border: 0; width: 100%; height: 100%; display: block }
</style></head>
<body CLASSES><iframe src="data/plugin_entry.html?name=stability&set=SET"></iframe><script>
window.addEventListener("message", (event) => {
  if (event.data !== "experimental.bootstrap") return;
  window.port = event.ports[0];
  window.port.onmessage = (answer) => { window.answered = JSON.parse(answer.data); };
});
window.reloadData = () => window.port.postMessage(JSON.stringify(
  { type: "experimental.DataReloaded", id: 7, payload: null, error: null, isReply: false }));
</script></body></html>"""


def info(run, rows, layers, incidents, parts=("",)):
    last = rows[-1][1] if rows else 0
    optimizers = [{"index": i, "part": part} for i, part in enumerate(parts)]
    entry = {"run": run, "steps": len(rows), "layers": layers, "incidents": incidents, "last": last}
    return entry | {"optimizers": optimizers}


@cache
def normal():
    """A run with three incidents, its clean twin, and one that has only just begun."""
    rows, clean = run_rows(), run_rows(470, seed=3, faults=False)
    runs = [info("translation", rows, 35, 3), info("twin", clean, 35, 0), info("begun", [], 0, 0)]
    data = {
        "translation": (steps_of(rows), run_layers(rows), three_incidents(rows)),
        "twin": (steps_of(clean), run_layers(clean, seed=5, every=5), []),
        "begun": (steps_of([]), layers_of([], [], [], np.zeros(0)), []),
    }
    return runs, data


@cache
def sampled():
    """The run of `normal` with one step in ten kept, and of layers the rejected ones too."""
    rows = run_rows()
    kept = [row for row in rows if row[0] % 10 == 9]
    layers = run_layers(rows, every=10, skipped=True)
    data = {"translation": (steps_of(kept), layers, three_incidents(rows))}
    return [info("translation", kept, 35, 3)], data


@cache
def gan():
    """A run of two optimizers that step by turns, and one that has a single one."""
    rows, single = two_optimizers(run_rows()), run_rows(200, seed=3, faults=False)
    parts = ("generator", "discriminator")
    data = {
        "gan": (steps_of(rows[::2]), run_layers(rows[::2]), three_incidents(rows)),
        ("gan", "1"): (steps_of(rows[1::2]), run_layers(rows[1::2], seed=9), three_incidents(rows)),
        "single": (steps_of(single), run_layers(single), []),
    }
    return [info("gan", rows, 35, 3, parts), info("single", single, 35, 0)], data


@cache
def repeated():
    """A run in which one sample is bad in every epoch."""
    rows = run_rows(faults=False)
    entry = info("repeated", rows, 35, 6)
    entry |= {"status": {"state": "finished", "step": 500, "time": 1.8e9}, "updated": 1.8e9}
    return [entry], {"repeated": (steps_of(rows), run_layers(rows), same_sample(rows))}


@cache
def unknown():
    """A run with a spike of which nothing is known."""
    rows = run_rows(faults=False)
    spike = incident(1, "loss spike", rows[450], rows, outcome="observed")
    return [info("unknown", rows, 35, 1)], {"unknown": (steps_of(rows), run_layers(rows), [spike])}


@cache
def markup():
    """A run in which every text that comes from outside is markup."""
    rows = run_rows(200)
    first = three_incidents(run_rows())[0]
    faulty = first | {
        "message": MARKUP,
        "cause": MARKUP,
        "layers": [[MARKUP, 1.0]],
        "responses": [MARKUP],
        "path": MARKUP,
        "origin": first["origin"] | {"module": MARKUP, "file": MARKUP},
        "hypotheses": [first["hypotheses"][0] | {"cause": MARKUP, "evidence": [MARKUP]}],
    }
    data = {MARKUP: (steps_of(rows, [MARKUP, MARKUP]), run_layers(rows, markup=True), [faulty])}
    return [info(MARKUP, rows, 35, 1)], data


@cache
def large():
    """20,000 steps of 300 layers."""
    n, layers = 20_000, 300
    rng = np.random.default_rng(0)
    norms = np.exp(0.3 * rng.standard_normal(n))
    losses = 2 + 6 * np.exp(-np.arange(n) / 4000) + 0.1 * rng.standard_normal(n)
    losses[12_431], norms[12_431] = np.nan, np.inf
    rows = [
        [
            i,
            i,
            plain(float(losses[i])),
            plain(float(norms[i])),
            0.001,
            3e-4,
            1.0,
            5.0,
            65536.0,
            0,
            1,
        ]
        for i in range(n)
    ]
    values = np.exp(0.5 * rng.standard_normal((n, layers), dtype=np.float32))
    values[12_431, 140:] = np.nan
    names = [f"model.layers.{i // 12}.part_{i % 12}.weight" for i in range(layers)]
    data = {"large": (steps_of(rows), layers_of(names, [*range(n)], [*range(n)], values), [])}
    return [info("large", rows, layers, 0)], data


@cache
def damaged():
    """A run of which a layer tag and two of five incident records cannot be read, and its twin."""
    runs, data = normal()
    bad = info("bad", run_rows(), 35, 5)
    bad["problem"] = "stability/layers/grad_norm/ab is damaged: its metadata is not JSON"
    return [bad, *runs[1:]], {"bad": data["translation"], **data}


def broken():
    """A run whose steps cannot be read."""
    return [info("broken", [[0, 0]], 1, 0)], {}


SETS = {"normal": normal, "empty": lambda: ([], {}), "markup": markup, "large": large}
SETS |= {
    "broken": broken,
    "damaged": damaged,
    "sampled": sampled,
    "gan": gan,
    "repeated": repeated,
    "unknown": unknown,
}


@cache
def answer(name, route, run, quantity, optimizer="0"):
    """The JSON of a route as bytes, or None where there is no such run or optimizer."""
    runs, data = SETS[name]()
    if route == "runs":
        return json.dumps(runs, allow_nan=False).encode()
    key = run if optimizer == "0" else (run, optimizer)
    if key not in data:
        return None
    steps, layers, incidents = data[key]
    if route == "verdict":
        return json.dumps(verdict_of(incidents, len(steps["rows"])).as_dict()).encode()
    if route == "layers" and quantity == "update_ratio" and run == "twin":
        layers = layers_of([], [], [], np.zeros(0))
    found = {"steps": steps, "layers": layers, "incidents": incidents}[route]
    return json.dumps(found, allow_nan=False).encode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/":
            self.server.asked_for = query.get("set", "normal")
            page = HOST.replace("SET", self.server.asked_for)
            dark = 'class="dark-mode"' if "dark" in query else ""
            self.reply(page.replace("CLASSES", dark).encode(), "text/html")
        elif url.path == "/data/plugin_entry.html":
            self.reply(FRAME.encode(), "text/html", [("Content-Security-Policy", POLICY)])
        else:
            self.plugin(url.path.removeprefix("/data/plugin/stability/"), query)

    def plugin(self, route, query):
        file = STATIC / Path(route).name
        if route.startswith("static/") and file.is_file():
            return self.reply(file.read_bytes(), TYPES[file.suffix])
        self.server.requests.append((route, query))
        run, quantity = query.get("run", ""), query.get("quantity", "")
        optimizer = query.get("optimizer", "0")
        body = answer(self.server.asked_for, route, run, quantity, optimizer)
        if body is not None:
            return self.reply(body, "application/json")
        error = {"error": f"no run {run!r}", "do": "look at the log directory"}
        return self.reply(json.dumps(error).encode(), "application/json", status=404)

    def reply(self, body, kind, headers=(), status=200):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class PageServer(ThreadingHTTPServer):
    """Serves on a free port until it is closed; `requests` are those for data."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked_for, self.requests = "normal", []
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    def warm(self, name):
        """Make the answers beforehand."""
        for run in SETS[name]()[1]:
            for route in ("steps", "layers", "incidents", "verdict"):
                answer(name, route, run, "grad_norm" if route == "layers" else "")

    def close(self):
        self.shutdown()
        self.server_close()
        self.thread.join()
