"""Finds weights, moments and buffers that are damaged before the first step. May import torch.

A state that was saved with a NaN cannot be repaired by going back to it: it is found at the start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.norms import non_finite, norms_of, to_host
from lit_stability.measurement.step_meter import StepMeter

_FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""Keys of averages of squares in the state of an optimizer, of which none may be negative."""

_RUNNING = ("running_mean", "running_var")
"""Names of the statistics in normalization layers."""


@dataclass(frozen=True)
class DamagedState:
    """Names of what is damaged, the same on all ranks."""

    weights: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    """Parameters whose optimizer state holds a NaN or Inf, or a negative average of squares."""
    buffers: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.weights or self.moments or self.buffers)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, weights first."""
        moments = (f"optimizer state of {name}" for name in self.moments)
        return (*self.weights, *moments, *self.buffers)

    @classmethod
    def of_ranks(cls, found: Iterable[DamagedState]) -> DamagedState:
        """Returns what any rank has found."""
        found = list(found)
        return cls(
            weights=_once(name for each in found for name in each.weights),
            moments=_once(name for each in found for name in each.moments),
            buffers=_once(name for each in found for name in each.buffers),
        )

    def text(self) -> str:
        """Returns what is damaged, in one sentence.

        >>> DamagedState(weights=("net.weight",), buffers=("norm.running_var",)).text()
        'net.weight is non-finite, and 1 more'
        """
        negative = " or negative" * bool(self.moments and not self.weights)
        more = f", and {len(self.names) - 1} more" * (len(self.names) > 1)
        return f"{self.names[0]} is non-finite{negative}{more}"


@torch.no_grad()
def buffers_with_nan(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of buffers that hold a NaN, in one copy to the host if there are none."""
    return tuple(n for n, b in _suspected(module.named_buffers()) if _has_nan(b))


@torch.no_grad()
def damaged_state(
    module: nn.Module, meters: Iterable[StepMeter], nan_before: Collection[str]
) -> DamagedState:
    """Returns what is damaged among the tensors that this rank holds.

    A tensor that is not trained may be non-finite on purpose: a mask of -inf, a limit that starts
    at inf, a buffer that is NaN until its value is known. It counts as damaged if it is a running
    mean or variance, if it is a frozen parameter with a NaN, or a buffer with a NaN that it did not
    hold before the checkpoint was loaded.

    Args:
        module: at the start of its training, after a checkpoint was loaded.
        meters: of its optimizers.
        nan_before: names of buffers that held a NaN before, by `buffers_with_nan`.
    """
    weights: list[str] = []
    moments: list[str] = []
    trained: set[str] = set()
    for meter in meters:
        pairs = zip(meter.names, meter.parameters, strict=True)
        trained.update(name for name, parameter in pairs if parameter.requires_grad)
        bad_weights, bad_moments = meter.audit()
        weights += [name for name in bad_weights if name in trained]
        moments += [*bad_moments, *_negative_squares(meter)]
    frozen = ((n, p) for n, p in module.named_parameters() if n not in trained)
    weights += [name for name, tensor in _suspected(frozen) if _has_nan(tensor)]
    buffers = (
        name
        for name, buffer in _suspected(module.named_buffers())
        if name.rpartition(".")[2] in _RUNNING or (name not in nan_before and _has_nan(buffer))
    )
    return DamagedState(*map(_once, (weights, moments, buffers)))


def _suspected(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Tensors with a NaN, an Inf, or a norm that overflows."""
    tensors = {n: local(t) for n, t in named if t.dtype in _FORMATS and not t.is_meta}
    tensors = {n: t for n, t in tensors.items() if t.layout is torch.strided and t.numel()}
    norms = to_host({"norms": norms_of(list(tensors.values()))})["norms"]
    bad = non_finite(list(tensors), norms)
    return [(name, tensors[name]) for name in bad if not bool(torch.isfinite(tensors[name]).all())]


def _negative_squares(meter: StepMeter) -> tuple[str, ...]:
    """Names of parameters with a negative average of squares, whose root is a NaN."""
    names: list[str] = []
    smallest: list[Tensor] = []
    for name, parameter in zip(meter.names, meter.parameters, strict=True):
        state = meter.optimizer.state.get(parameter) or {}
        for value in (state.get(key) for key in _SQUARES):
            if isinstance(value, Tensor) and value.dtype in _FORMATS and value.numel():
                names.append(name)
                smallest.append(local(value).amin().float().reshape(1))
    values = to_host({"smallest": smallest})["smallest"]
    return tuple(name for name, value in zip(names, values, strict=True) if value < 0)


def _has_nan(tensor: Tensor) -> bool:
    return bool(torch.isnan(tensor).any())


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
