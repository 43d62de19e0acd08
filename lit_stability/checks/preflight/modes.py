"""Compares train() with eval() without dropout, and names the first module that differs.

May import torch; does not import Lightning.
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
"""Relative difference that counts as rounding: torch may run other kernels in eval mode."""

_SAMPLE = 4096
"""Approximate number of elements sampled from an output, evenly spaced; at most twice as many."""


@dataclass(frozen=True)
class Call:
    """One call of a module, with checksums of its inputs and output."""

    module: str
    inputs: Tensor
    output: Tensor


def check_modes(subject: Subject) -> list[Finding]:
    """Compares the outputs of all modules in train and in eval mode, call by call.

    Dropout is disabled and BatchNorm uses its running statistics in both modes. Modules that draw
    other random numbers in train mode (stochastic depth, noise as augmentation) differ on purpose;
    a second run in train mode identifies them, and modules after them are not compared.
    """
    train_calls = _calls(subject, training=True)
    repeated_calls = _calls(subject, training=True, seed=1)
    eval_calls = _calls(subject, training=False)
    for train, repeated, evaluated in zip(train_calls, repeated_calls, eval_calls, strict=False):
        if train.module != evaluated.module:
            return [_finding(train.module, "other modules are called from here on")]
        if not _same(train.output, repeated.output):
            return [_random(train.module)] if _same(train.inputs, repeated.inputs) else []
        same_inputs = _same(train.inputs, evaluated.inputs)
        if same_inputs and not _same(train.output, evaluated.output):
            return [_finding(train.module, "its output differs for the same input")]
    return []


def _finding(module: str, what: str) -> Finding:
    return Finding(
        check="modes",
        severity="warning",
        what=f"train() and eval() differ without dropout: {what}",
        where=(module or "training_step",),
        why="the model that is validated and deployed differs from the model that is trained",
        remedy="look for self.training in the module; nothing, if the difference is intended",
    )


def _random(module: str) -> Finding:
    return Finding(
        check="modes",
        severity="note",
        what="the module draws random numbers in train mode in addition to dropout; modules after "
        "it were not compared with eval mode",
        where=(module or "training_step",),
        why="it may be intended, like noise or stochastic depth",
        remedy="nothing, if it is intended",
    )


def _calls(subject: Subject, *, training: bool, seed: int | None = None) -> list[Call]:
    model = subject.model()
    quiet_dropout(model)
    for module in model.modules():
        statistics = isinstance(module, _NormBase) and module.track_running_stats
        module.training = training and not statistics
    with _recording(model) as calls, torch.no_grad(), WithoutDropout():
        loss = subject.loss(model, seed=seed)
    calls.append(Call("", torch.zeros(1), _checksum(loss)))
    return calls


@contextlib.contextmanager
def _recording(model: nn.Module) -> Iterator[list[Call]]:
    """Records every call of a submodule while the context is active."""
    calls: list[Call] = []

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(Call(name, _checksum((args, kwargs)), _checksum(output)))

        return hook

    handles = [
        module.register_forward_hook(hook_for(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _checksum(value: Any) -> Tensor:
    """Returns rms, two projections and size of a sample of the first floating-point tensor."""
    tensor = first_tensor(value)
    if tensor is None or not tensor.numel():
        return torch.zeros(1)
    flat = tensor.flatten()
    # `loss.check_finite` reports NaN; here it only must not break the comparison.
    flat = flat[:: max(1, len(flat) // _SAMPLE)].cpu().double().nan_to_num(nan=0.5)
    wave = torch.arange(len(flat), dtype=torch.double)
    rms = flat.square().mean().sqrt()
    sums = [rms, (flat * wave.cos()).mean(), (flat * (wave * 0.37).sin()).mean()]
    return torch.stack([*sums, torch.tensor(float(len(flat)), dtype=torch.double)]).cpu()


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(torch.maximum(a[0].abs(), b[0].abs()))
    # The mean projection of n independent errors is smaller than their rms by a factor sqrt(n).
    root = float(a[-1]) ** 0.5 if len(a) > 1 else 1.0
    close = ((a - b).abs()[1:] * root <= TOLERANCE * scale + 1e-12).all()
    return bool(close) and abs(float(a[0] - b[0])) <= TOLERANCE * scale + 1e-12
