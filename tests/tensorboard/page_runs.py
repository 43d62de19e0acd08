"""Runs as the plugin would serve them: made up, always the same, for the tests of the page."""

import base64
import math

import numpy as np

FIELDS = ["attempt", "step", "loss", "grad_norm", "update_ratio", "learning_rate", "lr_factor"]
FIELDS += ["clip_threshold", "loss_scale", "precision", "optimizer", "taken"]
PRECISIONS = ["16-mixed", "bf16-mixed"]
NAN_AT, WEIGHT_AT, RATE_AT = 150, 251, 383
"""Attempts at which the three incidents open."""
LAST = 476
"""Last step of its 500 attempts."""
MARKUP = '<img src=x onerror="window.parent.faulty=1">'


def plain(value):
    """A number as the JSON has it: what is not finite is a string."""
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def steps_of(rows, precisions=PRECISIONS):
    return {"fields": FIELDS, "rows": rows, "precisions": precisions}


def layers_of(names, attempts, steps, values):
    data = base64.b64encode(values.astype("<f4").tobytes()).decode()
    return {"names": names, "attempts": attempts, "steps": steps, "values": data}


def run_rows(attempts=500, seed=0, faults=True):
    """A run that meets a NaN batch, a damaged weight (rolled back) and a jumping learning rate."""
    rng, rows, step = np.random.default_rng(seed), [], 0
    for attempt in range(attempts):
        loss = 1.6 + 5.0 * math.exp(-step / 90) + 0.06 * rng.standard_normal()
        norm = (0.6 + 2.2 * math.exp(-step / 120)) * math.exp(0.25 * rng.standard_normal())
        rate = 0.003 * min(1.0, (step + 1) / 60)
        factor, taken = 1.0, 1
        if faults and attempt in (NAN_AT, WEIGHT_AT):
            loss, norm, taken = math.nan, math.nan, 0
        if faults and WEIGHT_AT < attempt < WEIGHT_AT + 60:
            factor = 0.5
        if faults and RATE_AT <= attempt < RATE_AT + 40:
            rate, factor, norm = 0.003, 0.0101, norm * 1.5
        scale = 65536.0 if attempt < NAN_AT else 32768.0
        ratio = 0.004 * rate / 0.003 * factor * math.exp(0.2 * rng.standard_normal())
        clip = math.nan if attempt < 100 else 3.0
        measured = [loss, norm, ratio, rate * factor, factor, clip, scale]
        precision = int(faults and attempt > 320)
        rows.append(
            [attempt, step, *(plain(float(each)) for each in measured), precision, 0, taken]
        )
        if faults and attempt == WEIGHT_AT:
            step -= 21
        else:
            step += taken
    return rows


def step_of(attempt):
    """Where an attempt of the run with faults is on the x axis."""
    return run_rows()[attempt][1]


def two_optimizers(rows):
    """The attempts of a run, by turns of either optimizer; the norms of the second are larger."""
    norm, whose = FIELDS.index("grad_norm"), FIELDS.index("optimizer")
    for row in rows[1::2]:
        row[norm] = row[norm] if isinstance(row[norm], str) else row[norm] + 1000
        row[whose] = 1
    return rows


def layer_names(blocks=4):
    parts = ["self_attention.query", "self_attention.value", "feed_forward.0", "norm"]
    stacks = [f"network.{s}.layers.{i}" for s in ("encoder", "decoder") for i in range(blocks)]
    inner = [f"{stack}.{part}.weight" for stack in stacks for part in parts]
    return ["network.embedding.weight", *inner, "network.head.weight", "network.head.bias"]


def run_layers(rows, seed=1, markup=False, every=1, skipped=False):
    names = layer_names()
    if markup:
        names[3] = MARKUP
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(-2, 1.2, len(names)))
    values = base * np.exp(0.35 * rng.standard_normal((len(rows), len(names))))
    for i, row in enumerate(rows):
        if row[0] in (NAN_AT, WEIGHT_AT):
            values[i, : len(names) // 2] = np.nan
        if RATE_AT <= row[0] < RATE_AT + 30:
            values[i, 20:26] *= 10 ** (2.2 * (1 - (row[0] - RATE_AT) / 30))
    values[60:120, 12] = 0.0
    values[:, 9] *= np.logspace(0, -3, len(rows))
    values[:90, -8:] *= np.linspace(0.004, 1, 90)[:, None]
    kept = [i for i, row in enumerate(rows) if i % every == 0 or (skipped and not row[-1])]
    where = [[rows[i][field] for i in kept] for field in (0, 1)]
    return layers_of(names, *where, values[kept])


def likely_cause(
    cause, certainty, *evidence, do="look at the batch", leave="it happens once a day"
):
    return {
        "cause": cause,
        "certainty": certainty,
        "points": {"certain": 8, "likely": 4, "possible": 2}[certainty],
        "evidence": list(evidence),
        "do": do,
        "leave": leave,
    }


def incident(number, kind, row, rows, **known):
    attempt = row[0]
    window = rows[max(0, attempt - 50) : attempt + 31]
    return {
        "id": number,
        "kind": kind,
        "step": row[1],
        "epoch": row[1] // 157,
        "batch_idx": row[1] % 157,
        "message": kind,
        "layers": [],
        "strikes": 1,
        "origin": None,
        "cause": known["hypotheses"][0]["cause"] if known.get("hypotheses") else "",
        "hypotheses": [],
        "since": row[1],
        "phase": "descent",
        "checks": ["within the first 1000 steps? yes: check initialisation and warm-up"],
        "evidence": [],
        "remedy": "look at the batch in the incident's folder",
        "responses": [],
        "path": None,
        "verdict": "",
        "outcome": "recovered",
        "closed_step": row[1] + 10,
        "time": 1795331900.0 + row[1],
        "attempt": attempt,
        "closed_attempt": attempt + 11,
        "spans": [],
        "window": {"fields": FIELDS, "rows": window},
        **known,
    }
