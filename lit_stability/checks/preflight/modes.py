"""train() against eval() with dropout off: a module that differs is named.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.operations import WithoutDropout, quiet_dropout
from lit_stability.checks.preflight.subject import Subject, first_tensor

TOLERANCE = 1e-3
"""Relative difference that is rounding: torch runs other kernels in eval mode."""

_SAMPLE = 4096
"""Elements of an output that are looked at, evenly spread; twice as many at most."""


@dataclass(frozen=True)
class Call:
    """One call of a module: numbers by which its input and output are told from others."""

    module: str
    given: Tensor
    gave: Tensor


def check_modes(subject: Subject) -> list[Finding]:
    """Compare the modules' outputs in train and in eval mode, call by call.

    Dropout is off in both, and BatchNorm takes its running statistics in both. What draws random
    numbers in train mode beside that (stochastic depth, noise as augmentation) differs on purpose:
    it is told apart by running train mode twice, and nothing after it is compared.
    """
    trained, again = _calls(subject, training=True), _calls(subject, training=True, seed=1)
    asked = _calls(subject, training=False)
    for one, two, other in zip(trained, again, asked, strict=False):
        if one.module != other.module:
            return [_finding(one.module, "other modules are called from here on")]
        if not _same(one.gave, two.gave):
            return [_random(one.module)] if _same(one.given, two.given) else []
        if _same(one.given, other.given) and not _same(one.gave, other.gave):
            return [_finding(one.module, "it gives another output for the same input")]
    return []


def _finding(module: str, what: str) -> Finding:
    return Finding(
        check="modes",
        severity="warning",
        what=f"train() and eval() differ without dropout: {what}",
        where=(module or "training_step",),
        why="what is validated and used is not what is trained",
        remedy="look for self.training in the module; a difference that is meant needs no change",
    )


def _random(module: str) -> Finding:
    return Finding(
        check="modes",
        severity="note",
        what="in train mode random numbers are drawn beside dropout; modules after it were not "
        "compared with eval mode",
        where=(module or "training_step",),
        why="it may be meant, as noise or stochastic depth are",
        remedy="nothing, if it is meant",
    )


def _calls(subject: Subject, *, training: bool, seed: int | None = None) -> list[Call]:
    model = subject.model()
    quiet_dropout(model)
    for module in model.modules():
        statistics = isinstance(module, _NormBase) and module.track_running_stats
        module.training = training and not statistics
    with _recording(model) as calls, torch.no_grad(), WithoutDropout():
        loss = subject.loss(model, seed=seed)
    calls.append(Call("", torch.zeros(1), _print(loss)))
    return calls


@contextlib.contextmanager
def _recording(model: nn.Module) -> Iterator[list[Call]]:
    calls: list[Call] = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, given: Any, named: Any, gave: Any) -> None:
            calls.append(Call(name, _print((given, named)), _print(gave)))

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _print(value: Any) -> Tensor:
    """Sums over a sample of a value's first floating tensor: rms, and two projections."""
    found = first_tensor(value)
    if found is None or not found.numel():
        return torch.zeros(1)
    flat = found.flatten()
    # What is NaN is another check's.
    flat = flat[:: max(1, len(flat) // _SAMPLE)].cpu().double().nan_to_num(nan=0.5)
    wave = torch.arange(len(flat), dtype=torch.double)
    rms = flat.square().mean().sqrt()
    sums = [rms, (flat * wave.cos()).mean(), (flat * (wave * 0.37).sin()).mean()]
    return torch.stack([*sums, torch.tensor(float(len(flat)), dtype=torch.double)]).cpu()


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(torch.maximum(a[0].abs(), b[0].abs()))
    # A projection of n independent errors is smaller than their rms by sqrt(n).
    root = float(a[-1]) ** 0.5 if len(a) > 1 else 1.0
    near = ((a - b).abs()[1:] * root <= TOLERANCE * scale + 1e-12).all()
    return bool(near) and abs(float(a[0] - b[0])) <= TOLERANCE * scale + 1e-12
