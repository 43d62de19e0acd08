"""Finds weights, moments and buffers that are damaged before the first step. May import torch.

A state that was saved with a NaN cannot be repaired by going back to it: it is found at the start.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.norms import norms_of, to_host
from lit_stability.measurement.number_formats import FLOATS, is_measurable
from lit_stability.measurement.step_meter import StepMeter
from lit_stability.measurement.watched_buffers import RUNNING

Named: TypeAlias = tuple[str, Tensor]

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""Keys of averages of squares in the state of an optimizer, of which none may be negative."""


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
    bad, _ = _read({"buffers": list(module.named_buffers())}, [])
    return tuple(name for name, buffer in bad["buffers"] if _has_nan(buffer))


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
    meters = list(meters)
    trained = {n: p for m in meters for n, p in _pairs(m) if p.requires_grad}
    ids = {id(p) for p in trained.values()}
    squares = [each for meter in meters for each in _moments(meter, _SQUARES)]
    bad, negative = _read(
        {
            "trained": list(trained.items()),
            "frozen": [(n, p) for n, p in module.named_parameters() if id(p) not in ids],
            "moments": [each for meter in meters for each in _moments(meter)],
            "buffers": list(module.named_buffers()),
        },
        squares,
    )
    frozen = (name for name, tensor in bad["frozen"] if _has_nan(tensor))
    buffers = (
        name
        for name, buffer in bad["buffers"]
        if name.rpartition(".")[2] in RUNNING or (name not in nan_before and _has_nan(buffer))
    )
    return DamagedState(
        weights=_once([*(name for name, _ in bad["trained"]), *frozen]),
        moments=_once([*(name for name, _ in bad["moments"]), *negative]),
        buffers=_once(buffers),
    )


def _pairs(meter: StepMeter) -> Iterable[Named]:
    return zip(meter.names, meter.parameters, strict=True)


def _moments(meter: StepMeter, keys: Collection[str] | None = None) -> list[Named]:
    """The tensors in the optimizer's state, with the names of their parameters."""
    return [
        (name, value)
        for name, parameter in _pairs(meter)
        for key, value in (meter.optimizer.state.get(parameter) or {}).items()
        if isinstance(value, Tensor) and (keys is None or key in keys)
    ]


def _read(
    groups: Mapping[str, Sequence[Named]], squares: Sequence[Named]
) -> tuple[dict[str, list[Named]], list[str]]:
    """Reads all tensors in one copy to the host.

    Returns:
        The tensors of each group with a NaN or Inf, and the names of squares that are negative.
    """
    readable = {key: _readable(group) for key, group in groups.items()}
    squares = _readable(squares)
    host = to_host(
        {key: [_norms(group)] for key, group in readable.items() if group}
        | {"smallest": [_smallest(squares)] if squares else []}
    )
    bad: dict[str, list[Named]] = {key: [] for key in groups}
    for key, group in readable.items():
        pairs = zip(group, host.get(key, ()), strict=True)
        suspected = [named for named, norm in pairs if not math.isfinite(norm)]
        # The norm of large finite elements overflows.
        bad[key] = [(n, t) for n, t in suspected if not bool(torch.isfinite(t).all())]
    smallest = zip(squares, host["smallest"], strict=True)
    return bad, [name for (name, _), value in smallest if value < 0]


def _readable(named: Iterable[Named]) -> list[Named]:
    """This rank's part of each tensor that has elements and a floating-point format."""
    real = [(n, t) for n, t in named if is_measurable(t) and t.dtype in FLOATS]
    own = [(n, local(t)) for n, t in real if not t.is_meta]
    return [(n, t) for n, t in own if t.layout is torch.strided and t.numel()]


def _norms(group: Sequence[Named]) -> Tensor:
    """The norms, one device after the other, on the first of them."""
    device = group[0][1].device
    norms = [norms_of([t])[0].to(device) for _, t in group if t.device != device]
    here = norms_of([t for _, t in group if t.device == device])
    if not norms:
        return here[0]
    rows = iter(here[0].unbind())
    others = iter(norms)
    return torch.stack(
        [next(rows) if t.device == device else next(others).reshape(()) for _, t in group]
    )


def _smallest(group: Sequence[Named]) -> Tensor:
    device = group[0][1].device
    return torch.stack([t.amin().float().to(device) for _, t in group])


def _has_nan(tensor: Tensor) -> bool:
    return bool(torch.isnan(tensor).any())


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
