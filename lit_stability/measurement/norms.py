"""Norms of many tensors in one pass, and the single copy to the host.

Small tensors of one shape are stacked and read by one kernel: a call per tensor costs a microsecond
or more, however small the tensor is, so a model of thousands of small tensors would spend its time
in calls. May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, mul

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import PLAIN, local
from lit_stability.measurement.step_stats import ProbeReading
from lit_stability.measurement.weight_sampling import real

_SMALL = 2048
"""Elements up to which a kernel call takes longer than copying the tensor into a stack."""
_MIN_STACK = 8
"""Smallest number of tensors of one shape for which stacking pays."""
_STACK_SIZE = 2**18
"""Elements per stack: a mebibyte of fp32 is still in the cache when it is read."""

_PART = 2**20
"""Elements of 16 bits that are converted to fp32 together."""

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


@dataclass(frozen=True)
class DeviceReadings:
    """Measurements of a probe on the device, to be copied together with the step's statistics."""

    numbers: Tensor
    """One-dimensional float32 tensor on the device."""
    read: Callable[[Sequence[float]], list[ProbeReading]]
    """Turns the numbers, copied to the host, into readings."""


def dense(grad: Tensor) -> Tensor:
    """Returns the elements of a gradient that this rank holds."""
    grad = local(grad)
    return real(grad.coalesce().values() if grad.is_sparse else grad)


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the norms in one tensor, computed in fp32 or wider because fp16 would overflow."""
    if not tensors:
        return []
    types = {t.dtype for t in tensors}
    if types == {torch.float32} and len({t.device for t in tensors}) == 1:
        return [torch.stack(torch._foreach_norm(list(tensors), 2.0))]
    tensors = [real(t) for t in tensors]
    types = {t.dtype for t in tensors}
    wide = types <= {torch.float32, torch.float64}
    widest = torch.float64 if torch.float64 in types else torch.float32
    if wide:
        return [_stacked(torch._foreach_norm(tensors, 2.0))]
    if _on_cpu(tensors):
        return [_stacked([_norm(t) for t in tensors])]
    return [_stacked(torch._foreach_norm(tensors, 2.0, dtype=widest))]


def _norm(tensor: Tensor) -> Tensor:
    """Returns the norm of a tensor on a CPU, in fp32 or wider.

    There, torch converts a tensor of 16 bits to fp32 as a whole before it reads it, which takes
    twice its memory once more. So a large one is converted part by part, into one buffer.
    """
    wide = tensor.dtype in (torch.float32, torch.float64)
    if wide or tensor.numel() <= _PART or not tensor.is_contiguous():
        return _vector_norm(tensor)
    buffer = tensor.new_empty(_PART, dtype=torch.float32)
    parts = torch.split(tensor.reshape(-1), _PART)
    norms = [_vector_norm(buffer[: len(part)].copy_(part)) for part in parts]
    return _vector_norm(torch.stack(norms))


def _vector_norm(tensor: Tensor) -> Tensor:
    wide = tensor.dtype in (torch.float32, torch.float64)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=None if wide else torch.float32)
    return norm


def peaks_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the largest absolute values in one tensor; 0 for a tensor without elements.

    The maximum norm of ``_foreach_norm`` takes ten times as long on a CPU.
    """
    if not tensors:
        return []
    return [_stacked([_peak(real(t)) for t in tensors])]


def norms_and_peaks(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns `norms_of` and `peaks_of`; on a CPU both of each tensor while it is in the cache."""
    if not _on_cpu(tensors):
        return norms_of(tensors), peaks_of(tensors)
    if not tensors:
        return [], []
    norms, peaks = [], []
    for t in map(real, tensors):
        norms.append(_norm(t))
        peaks.append(_peak(t))
    return [_stacked(norms)], [_stacked(peaks)]


def _on_cpu(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels cost what they read; elsewhere they cost a launch each."""
    return all(t.device.type == "cpu" for t in tensors)


def _peak(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.new_zeros(())
    if _on_cpu([tensor]):  # there, two passes take less than one of `aminmax`
        return torch.maximum(-tensor.amin(), tensor.amax())
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high)


def _stacked(numbers: Sequence[Tensor]) -> Tensor:
    """Stacks scalars of any dtype into one fp32 tensor on the device of the first."""
    if {n.dtype for n in numbers} == {torch.float32} and len({n.device for n in numbers}) == 1:
        return torch.stack(list(numbers))
    device = numbers[0].device
    return torch.stack([n.to(device=device, dtype=torch.float32) for n in numbers])


def to_host(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, list[float]]:
    """Copies groups of one-dimensional tensors to the host in one transfer."""
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
    """Returns the names with a non-finite norm, each once."""
    if math.isfinite(sum(norms)):
        return ()
    return tuple(
        dict.fromkeys(n for n, w in zip(names, norms, strict=False) if not math.isfinite(w))
    )


def total(norms: Sequence[float]) -> float:
    """Returns the norm of the whole from those of its parts; NaN and Inf carry over."""
    return math.sqrt(math.fsum(map(mul, norms, norms)))


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of a step."""

    names: tuple[str, ...]
    """Names of the parameters that have a gradient."""
    tensors: list[Tensor]
    """Elements that this rank holds, in the order of ``names``."""
    complete: bool
    """Whether every parameter has a gradient that is a plain tensor of its shape."""


def gradients_of(names: tuple[str, ...], parameters: Sequence[Tensor]) -> Gradients:
    """Returns the existing gradients of the parameters.

    Args:
        names: of the parameters.
        parameters: before their update.
    """
    grads = [p.grad for p in parameters]
    existing = [grad for grad in grads if grad is not None]
    if len(existing) == len(grads) and _are_plain(existing):
        return Gradients(names, existing, True)
    pairs = [(n, dense(g)) for n, g in zip(names, grads, strict=True) if g is not None]
    return Gradients(tuple(n for n, _ in pairs), [g for _, g in pairs], False)


@dataclass(frozen=True, slots=True)
class MeasuredGradients:
    """Gradients as they were measured, so that a clip after that need not read them again."""

    tensors: list[Tensor]
    """One for each parameter; plain tensors."""
    norms: Tensor
    """Their norms, on the device."""
    total: float
    """Norm of all of them, on the host."""
    stacked: Sequence[int]
    """Indices of those whose norm may differ in the last bit from `torch._foreach_norm`'s."""
    versions: list[int]
    """Version counter of each."""


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    if not set(map(type, tensors)) <= PLAIN or set(map(_layout, tensors)) - {torch.strided}:
        return False
    return not any(dtype.is_complex for dtype in set(map(_dtype, tensors)))


class BatchedNorms:
    """Plan for measuring a list of tensors, in which small ones of one shape are stacked.

    Stacks on a CPU only; other devices have foreach kernels, which read all tensors in one launch.

    Args:
        tensors: examples with the shapes and dtypes of the tensors to measure later.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._stacks = [part for group in _groups(tensors) for part in _parts(group, tensors)]
        stacked = [i for part in self._stacks for i in part]
        self.stacked = sorted(stacked)
        """Indices of the tensors that are stacked."""
        self._rest = sorted(set(range(len(tensors))) - set(stacked))
        self._original_order = torch.tensor([*stacked, *self._rest]).argsort()

    def norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns `norms_of` of the tensors.

        Args:
            tensors: plain tensors in the order and with the shapes of the constructor's, or a list
                of another length, which is measured without stacking.
        """
        if not self._stacks or len(tensors) != len(self._original_order):
            return norms_of(tensors)
        norms = [_norms(rows) for rows in self._rows(tensors)]
        return [torch.cat([*norms, *norms_of(self._others(tensors))])[self._original_order]]

    def norms_and_peaks(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns `norms_and_peaks` of the tensors; argument as in `norms`."""
        if not self._stacks or len(tensors) != len(self._original_order):
            return norms_and_peaks(tensors)
        norms, peaks = [], []
        for rows in self._rows(tensors):
            norms.append(_norms(rows))
            peaks.append(torch.maximum(-rows.amin(1), rows.amax(1)).float())
        more_norms, more_peaks = norms_and_peaks(self._others(tensors))
        return (
            [torch.cat([*norms, *more_norms])[self._original_order]],
            [torch.cat([*peaks, *more_peaks])[self._original_order]],
        )

    def _rows(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields matrices with one tensor per row."""
        for part in self._stacks:
            yield torch.cat([tensors[i] for i in part]).reshape(len(part), -1)

    def _others(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in self._rest]


def _groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Returns groups of indices of small tensors with the same shape and dtype."""
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    if not _on_cpu(tensors):
        return []
    for i, t in enumerate(tensors):
        if _may_be_stacked(t):
            groups.setdefault((t.shape, t.dtype), []).append(i)
    return [group for group in groups.values() if len(group) >= _MIN_STACK]


def _may_be_stacked(tensor: Tensor) -> bool:
    if type(tensor) not in PLAIN or tensor.dtype.is_complex:
        return False
    return tensor.layout is torch.strided and tensor.dim() > 0 and 0 < tensor.numel() <= _SMALL


def _parts(group: list[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Splits a group into parts of about `_STACK_SIZE` elements."""
    count = max(_MIN_STACK, _STACK_SIZE // tensors[group[0]].numel())
    return [group[i : i + count] for i in range(0, len(group), count)]


def _norms(rows: Tensor) -> Tensor:
    wide = rows.dtype in (torch.float32, torch.float64)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=None if wide else torch.float32)
    return norms.float()
