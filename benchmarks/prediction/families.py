"""Families of runs: their faults, and the hyperparameters that are drawn from the seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.prediction.runs import (
    Net,
    Run,
    adam,
    batches,
    exponential,
    gpt,
    he_normal,
    jump,
    linear,
    mlp,
    restarts,
    sgd,
)


def _net(r: random.Random, *args: object, **kwargs: object) -> Net:
    return Net(mlp(r.choice((16, 32, 64, 128)), r.choice((1, 2, 3))), *args, **kwargs)  # type: ignore[arg-type]


def _plain(r: random.Random, seed: int, *args: object, steps: int = 300, **kwargs: object) -> Run:
    module = _net(r, *args, **kwargs)
    return Run(module=module, data=batches(seed, steps), steps=steps)


def _tanh_full_batch(r: random.Random, seed: int) -> Run:
    net = mlp(32, 2, nn.Tanh)
    module = Net(net, sgd(r.uniform(0.15, 0.35), 0.0))
    return Run(module=module, data=batches(seed, 1) * 500, steps=500)


def _sines(r: random.Random, seed: int) -> Run:
    module = Net(mlp(20, 2, nn.Tanh), adam(r.uniform(0.01, 0.03), r.choice((0.99, 0.98))))
    return Run(module=module, data=batches(seed, 1, noise=lambda step: 0.0) * 500, steps=500)


def _converged(r: random.Random, seed: int) -> Run:
    net = mlp(64, 2, nn.Tanh)
    module = Net(net, r.choice((adam(3e-3), sgd(0.05))))
    return Run(module=module, data=batches(seed, 4, noise=lambda step: 0.0) * 150, steps=600)


def _curriculum(r: random.Random, seed: int) -> Run:
    levels = [0.3, r.uniform(0.34, 0.4), r.uniform(0.42, 0.48)]
    data = batches(seed, 300, noise=lambda step: levels[min(2, step // 100)])
    return Run(module=_net(r, r.choice((adam(1e-3), sgd(0.02)))), data=data)


def _deep(r: random.Random, seed: int, per_step: float) -> Run:
    net = he_normal(mlp(r.choice((32, 64)), r.choice((12, 16, 20))))
    module = Net(net, sgd(1e-3, 0.9), linear(0, per_step))
    return Run(module=module, data=batches(seed, 250), steps=250)


def _half(r: random.Random, seed: int, module: Net, scale: float) -> Run:
    return Run(module=module, data=batches(seed, 300, scale=scale), fp16=True)


def _least_squares(r: random.Random, seed: int) -> Run:
    module = Net(nn.Linear(16, 1), sgd(0.1, 0.0), jump(_start(r), r.uniform(4, 8)))
    return Run(module=module, data=batches(seed, 1) * 400, steps=400)


def _feedback(r: random.Random, seed: int) -> Run:
    optimizer, at, per_step = (
        r.choice((sgd(0.01), adam(3e-3))),
        _start(r),
        r.uniform(0.01, 0.03),
    )
    module = _net(r, optimizer, feedback=lambda step: min(1.2, per_step * max(0, step - at)))
    return Run(module=module, data=batches(seed, 400), steps=400)


def _momentum(r: random.Random, seed: int) -> Run:
    at, high = _start(r), r.uniform(1.0, 1.06)
    net = r.choice((nn.Linear(16, 1), mlp(32, 1, nn.Tanh), mlp(32, 2)))
    module = Net(net, sgd(0.01), momentum=lambda step: high if step >= at else 0.9)
    return Run(module=module, data=batches(seed, 400), steps=400)


def _start(r: random.Random) -> int:
    return r.randrange(60, 200)


MakeRun = Callable[[random.Random, int], Run]
DIVERGING: dict[str, MakeRun] = {
    "SGD, exponential ramp": lambda r, s: _plain(
        r, s, sgd(0.01), exponential(50, r.uniform(0.01, 0.06)), steps=400
    ),
    "SGD, linear ramp": lambda r, s: _plain(r, s, sgd(0.02), linear(50, r.uniform(0.05, 0.3))),
    "Adam, exponential ramp": lambda r, s: _plain(
        r, s, adam(1e-3), exponential(50, r.uniform(0.02, 0.06)), steps=350
    ),
    "SGD, rate too high": lambda r, s: _plain(r, s, sgd(r.uniform(0.2, 0.6)), steps=200),
    "SGD, rate x10": lambda r, s: _plain(r, s, sgd(r.uniform(0.02, 0.06)), jump(_start(r), 10)),
    "SGD, rate x30": lambda r, s: _plain(r, s, sgd(r.uniform(0.02, 0.06)), jump(_start(r), 30)),
    "Adam, rate x30": lambda r, s: _plain(r, s, adam(r.uniform(1e-3, 5e-3)), jump(_start(r), 30)),
    "deep plain net": lambda r, s: _deep(r, s, r.uniform(0.05, 0.5)),
    "least squares past the edge": _least_squares,
    "targets that feed on the net": _feedback,
    "momentum above 1": _momentum,
    "fp16, exponential ramp": lambda r, s: _half(
        r, s, _net(r, sgd(0.005), exponential(50, r.uniform(0.02, 0.05))), r.choice((1, 30))
    ),
    "GPT, exponential ramp": lambda r, s: gpt(
        r, s, steps=260, schedule=exponential(50, r.uniform(0.03, 0.08))
    ),
    "GPT, linear ramp": lambda r, s: gpt(r, s, schedule=linear(50, r.uniform(2, 10))),
    "GPT, rate x30": lambda r, s: gpt(r, s, schedule=jump(_start(r), 30)),
    "GPT, rate x300": lambda r, s: gpt(r, s, schedule=jump(_start(r), 300)),
    "GPT, rate too high": lambda r, s: gpt(r, s, lr=r.uniform(0.3, 3.0), warmup=100),
    "GPT, post-norm, no warm-up": lambda r, s: gpt(
        r, s, post_norm=True, warmup=1, lr=r.uniform(0.03, 0.3)
    ),
}
"""Families of which most runs diverge; the losses decide which runs do."""

CALM: dict[str, MakeRun] = {
    "SGD": lambda r, s: _plain(r, s, sgd(r.uniform(0.005, 0.04))),
    "Adam": lambda r, s: _plain(r, s, adam(r.uniform(3e-4, 5e-3))),
    "edge of stability": _tanh_full_batch,
    "Adam's spikes": _sines,
    "converged": _converged,
    "curriculum": _curriculum,
    "warm restarts": lambda r, s: _plain(r, s, sgd(r.uniform(0.02, 0.05)), restarts(75)),
    "batches of 2": lambda r, s: Run(
        module=_net(r, r.choice((adam(1e-3), sgd(0.005)))), data=batches(s, 300, batch=2)
    ),
    "rate x2, harmless": lambda r, s: _plain(r, s, sgd(0.01), jump(_start(r), 2)),
    "deep plain net, low rate": lambda r, s: _deep(r, s, 0.0),
    "fp16": lambda r, s: _half(r, s, _net(r, sgd(0.005)), 1),
    "GPT": gpt,
    "GPT, long warm-up": lambda r, s: gpt(r, s, warmup=150),
    "GPT, warm restarts": lambda r, s: gpt(r, s, schedule=restarts(70)),
    "GPT, batches of 2": lambda r, s: gpt(r, s, batch=2),
}
"""Families of runs that should not raise an alarm."""

FAMILIES: dict[str, MakeRun] = {**DIVERGING, **CALM}


def make_run(family: str, seed: int) -> Run:
    """Creates the run of a family with a seed.

    Raises:
        ValueError: There is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)}, got {family!r}")
    torch.manual_seed(seed)
    return FAMILIES[family](random.Random(f"{family} {seed}"), seed)
