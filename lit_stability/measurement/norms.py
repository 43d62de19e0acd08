"""Norms of many tensors in one pass, and the one copy to the host.

Small tensors of one shape are rows that one kernel reads together: a call per tensor costs a
microsecond or more, however little it holds, and a model of thousands of small tensors would spend
its time in calls. May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, mul
from typing import Any

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import PLAIN, local
from lit_stability.measurement.step_stats import ProbeReading
from lit_stability.measurement.weight_sampling import real

_SMALL = 2048
"""Elements up to which it takes longer to call a kernel than to copy the tensor beside others."""
_MANY = 8
"""Tensors of one shape from which on it pays."""
_AT_ONCE = 2**18
"""Elements that are copied together: a mebibyte of fp32 is still in the cache when it is read."""

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


@dataclass(frozen=True)
class DeviceReadings:
    """What a probe has measured and not looked at, so that it comes with the step's one copy."""

    numbers: Tensor
    """On the device; of one dimension, float32."""
    read: Callable[[Sequence[float]], list[ProbeReading]]
    """What they mean, once they are on the host."""


def dense(grad: Tensor) -> Tensor:
    """The elements that this rank holds of a gradient."""
    grad = local(grad)
    return real(grad.coalesce().values() if grad.is_sparse else grad)


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms, in one tensor; in fp32 whatever the tensors' own format: fp16 would overflow."""
    if not tensors:
        return []
    types = {t.dtype for t in tensors}
    if types == {torch.float32} and len({t.device for t in tensors}) == 1:
        return [torch.stack(torch._foreach_norm(list(tensors), 2.0))]
    tensors = [real(t) for t in tensors]
    types = {t.dtype for t in tensors}
    wide = types <= {torch.float32, torch.float64}
    widest = torch.float64 if torch.float64 in types else torch.float32
    kwargs: dict[str, Any] = {} if wide else {"dtype": widest}
    return [_together(torch._foreach_norm(tensors, 2.0, **kwargs))]


def peaks_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Largest absolute values, in one tensor; 0 for one without elements.

    The maximum norm of ``_foreach_norm`` takes ten times as long on a CPU.
    """
    if not tensors:
        return []
    return [_together([_peak(real(t)) for t in tensors])]


def norms_and_peaks(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What `norms_of` and `peaks_of` give, of each tensor while a CPU has it in its cache."""
    if not all(t.device.type == "cpu" for t in tensors):
        return norms_of(tensors), peaks_of(tensors)
    if not tensors:
        return [], []
    norms, peaks = [], []
    for t in map(real, tensors):
        wide = t.dtype in (torch.float32, torch.float64)
        norms.append(torch.linalg.vector_norm(t, dtype=None if wide else torch.float32))
        peaks.append(_peak(t))
    return [_together(norms)], [_together(peaks)]


def _peak(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.new_zeros(())
    if tensor.device.type == "cpu":  # two passes of these take less than one of `aminmax` there
        return torch.maximum(-tensor.amin(), tensor.amax())
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high)


def _together(numbers: Sequence[Tensor]) -> Tensor:
    """Scalars of any format as one tensor of fp32, where the first is."""
    if {n.dtype for n in numbers} == {torch.float32} and len({n.device for n in numbers}) == 1:
        return torch.stack(list(numbers))
    device = numbers[0].device
    return torch.stack([n.to(device=device, dtype=torch.float32) for n in numbers])


def to_host(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, list[float]]:
    """The one copy to the host of an optimizer step."""
    tensors = [t for group in parts.values() for t in group]
    if not tensors:
        return {key: [] for key in parts}
    device = tensors[0].device
    flat = torch.cat([t if t.device == device else t.to(device) for t in tensors]).tolist()
    out: dict[str, list[float]] = {}
    start = 0
    for key, group in parts.items():
        end = start + sum(t.numel() for t in group)
        out[key] = flat[start:end]
        start = end
    return out


def non_finite(names: Sequence[str], norms: Sequence[float]) -> tuple[str, ...]:
    """The names whose norm is not finite, each once."""
    if math.isfinite(sum(norms)):
        return ()
    return tuple(
        dict.fromkeys(n for n, w in zip(names, norms, strict=False) if not math.isfinite(w))
    )


def total(norms: Sequence[float]) -> float:
    """Norm of the whole from the norms of its parts; NaN if a part is NaN, Inf if one is Inf."""
    return math.sqrt(math.fsum(map(mul, norms, norms)))


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of a step."""

    names: tuple[str, ...]
    """Of the parameters that have one."""
    tensors: list[Tensor]
    """The elements that this rank holds, in the order of ``names``."""
    complete: bool
    """Whether they are one plain tensor for each parameter, of its shape."""


def gradients_of(names: tuple[str, ...], parameters: Sequence[Tensor]) -> Gradients:
    """The gradients there are.

    Args:
        names: of the parameters.
        parameters: before their update.
    """
    found = [p.grad for p in parameters]
    there = [grad for grad in found if grad is not None]
    if len(there) == len(found) and _are_plain(there):
        return Gradients(names, there, True)
    pairs = [(n, dense(g)) for n, g in zip(names, found, strict=True) if g is not None]
    return Gradients(tuple(n for n, _ in pairs), [g for _, g in pairs], False)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    if not set(map(type, tensors)) <= PLAIN or set(map(_layout, tensors)) - {torch.strided}:
        return False
    return not any(dtype.is_complex for dtype in set(map(_dtype, tensors)))


class BatchedNorms:
    """Which of a list of tensors are measured together, and how.

    On a CPU; other devices have foreach kernels, which read all tensors in one launch.

    Args:
        tensors: of the shapes and formats that are to be measured.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._stacks = [part for group in _groups(tensors) for part in _parts(group, tensors)]
        stacked = [i for part in self._stacks for i in part]
        self._rest = sorted(set(range(len(tensors))) - set(stacked))
        self._back = torch.tensor([*stacked, *self._rest]).argsort()

    def norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What `norms_of` gives.

        Args:
            tensors: plain ones of the shapes that it was made for, or any others than these.
        """
        if not self._stacks or len(tensors) != len(self._back):
            return norms_of(tensors)
        norms = [_norms(rows) for rows in self._rows(tensors)]
        return [torch.cat([*norms, *norms_of(self._others(tensors))])[self._back]]

    def norms_and_peaks(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What `norms_and_peaks` gives; arguments as in `norms`."""
        if not self._stacks or len(tensors) != len(self._back):
            return norms_and_peaks(tensors)
        norms, peaks = [], []
        for rows in self._rows(tensors):
            norms.append(_norms(rows))
            peaks.append(torch.maximum(-rows.amin(1), rows.amax(1)).float())
        more_norms, more_peaks = norms_and_peaks(self._others(tensors))
        return (
            [torch.cat([*norms, *more_norms])[self._back]],
            [torch.cat([*peaks, *more_peaks])[self._back]],
        )

    def _rows(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Matrices with a tensor in each row, one after the other."""
        for part in self._stacks:
            yield torch.cat([tensors[i] for i in part]).reshape(len(part), -1)

    def _others(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self._rest]


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of small tensors of one shape and format."""
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    if not all(t.device.type == "cpu" for t in tensors):
        return []
    for i, t in enumerate(tensors):
        if _may_be_stacked(t):
            groups.setdefault((t.shape, t.dtype), []).append(i)
    return [group for group in groups.values() if len(group) >= _MANY]


def _may_be_stacked(tensor: Tensor) -> bool:
    if type(tensor) not in PLAIN or tensor.dtype.is_complex:
        return False
    return tensor.layout is torch.strided and tensor.dim() > 0 and 0 < tensor.numel() <= _SMALL


def _parts(group: list[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """A group in parts of `_AT_ONCE` elements."""
    count = max(_MANY, _AT_ONCE // tensors[group[0]].numel())
    return [group[i : i + count] for i in range(0, len(group), count)]


def _norms(rows: Tensor) -> Tensor:
    wide = rows.dtype in (torch.float32, torch.float64)
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=None if wide else torch.float32)
    return found.float()
