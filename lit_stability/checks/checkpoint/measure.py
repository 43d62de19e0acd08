"""Measures the tensors of a state dict, one after the other, in pieces that fit into memory.

May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_stability.checks.checkpoint.report import Kind, TensorHealth

_CHUNK = 2**16
"""Elements per piece: 0.5 MiB as float64, memory that the allocator reuses."""
_LARGEST = 9
"""Number of largest magnitudes to keep, in order to find a gap between them."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of torch's own layers, which a state dict does not distinguish from parameters."""


def measure_tensors(state: Mapping[str, Any]) -> tuple[TensorHealth, ...]:
    """Measures every tensor of a state dict; tied tensors are measured once.

    Args:
        state: Tensors by name; other values, such as a module's extra state, are ignored.
    """
    measured: list[TensorHealth] = []
    memory: dict[Any, TensorHealth] = {}
    values: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        first = memory.get(memory_of(tensor))
        if first is not None:
            measured.append(replace(first, name=name, same_memory=first.name))
            continue
        health = measure(name, tensor)
        health = replace(health, same_values=_twin(health, tensor, values))
        memory[memory_of(tensor)] = health
        measured.append(health)
    return tuple(measured)


def memory_of(tensor: Tensor) -> Any:
    """Returns a key that is equal for two tensors with the same memory, dtype, shape and stride."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def kind_of(name: str, tensor: Tensor) -> Kind:
    """Returns the kind of a tensor of a state dict; see `TensorHealth.kind`."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "integer"
    return "buffer" if name.rsplit(".", 1)[-1] in _BUFFERS else "parameter"


@torch.no_grad()
def measure(name: str, tensor: Tensor) -> TensorHealth:
    """Measures one tensor.

    Args:
        name: Its name in the state dict.
        tensor: Of any dtype and layout; a complex one is measured as real and imaginary parts.
    """
    kind, dtype = kind_of(name, tensor), str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if kind == "integer" or tensor.numel() == 0:
        return TensorHealth(name=name, kind=kind, shape=shape, dtype=dtype, elements=tensor.numel())
    flat = _dense(tensor)
    sums = _Sums()
    for piece in pieces(flat):
        sums.add(piece)
    torn, ratio = widest_gap(sums.largest)
    mean = sums.total / sums.finite if sums.finite else 0.0
    variance = sums.squares / sums.finite - mean**2 if sums.finite else 0.0
    return TensorHealth(
        name=name,
        kind=kind,
        shape=shape,
        dtype=dtype,
        elements=flat.numel(),
        norm=math.sqrt(sums.squares),
        mean=mean,
        std=math.sqrt(max(0.0, variance)),
        minimum=sums.low if sums.finite else 0.0,
        maximum=sums.high if sums.finite else 0.0,
        zeros=sums.zeros,
        nan=sums.nan,
        positive_inf=sums.positive_inf,
        negative_inf=sums.negative_inf,
        zero_rows=_zero_rows(flat),
        torn=torn,
        torn_ratio=ratio,
    )


def widest_gap(largest: list[float]) -> tuple[int, float]:
    """Returns how many of the largest magnitudes are above their widest gap, and its ratio.

    >>> widest_gap([4.0, 2.0, 1.0, 1.0])
    (1, 2.0)
    >>> widest_gap([3e38, 1e38, 2.0, 1.0])
    (2, 5e+37)
    """
    ratios = [(a / b, i) for i, (a, b) in enumerate(pairwise(largest), 1) if b]
    ratio, count = max(ratios, key=lambda pair: pair[0], default=(1.0, 0))
    return (count, ratio) if ratio > 1 else (0, 1.0)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the elements in float64, in one-dimensional pieces of limited size."""
    for piece in torch.split(tensor.reshape(-1), _CHUNK):
        yield piece.double()


class _Sums:
    """Statistics over the pieces of one tensor, in float64, so that no float32 value overflows."""

    def __init__(self) -> None:
        self.finite = self.zeros = self.nan = self.positive_inf = self.negative_inf = 0
        self.total = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf
        self.largest: list[float] = []

    def add(self, wide: Tensor) -> None:
        """Adds a piece, in float64."""
        finite = torch.isfinite(wide)
        if not bool(finite.all()):
            self.nan += int(torch.isnan(wide).sum())
            self.positive_inf += int(torch.isposinf(wide).sum())
            self.negative_inf += int(torch.isneginf(wide).sum())
            wide = wide[finite]
        if wide.numel() == 0:
            return
        self.finite += wide.numel()
        self.zeros += wide.numel() - int(torch.count_nonzero(wide))
        self.total += float(wide.sum())
        self.squares += float(torch.dot(wide, wide))
        low, high = torch.aminmax(wide)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        top = wide.abs().topk(min(_LARGEST, wide.numel())).values.tolist()
        self.largest = sorted([*self.largest, *top], reverse=True)[:_LARGEST]


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.element_size() > 1 else tensor.float()


def _zero_rows(flat: Tensor) -> int:
    if flat.ndim < 2:
        return 0
    return int((torch.count_nonzero(flat.reshape(flat.shape[0], -1), dim=1) == 0).sum())


def _twin(
    health: TensorHealth, tensor: Tensor, seen: dict[Any, list[tuple[str, Tensor]]]
) -> str | None:
    """Returns the name of an earlier tensor with the same values; ignores constant tensors."""
    if health.kind != "parameter" or health.std == 0 or health.damaged or health.elements < 2:
        return None
    others = seen.setdefault((health.shape, health.dtype, health.norm, health.largest), [])
    for name, other in others:
        if torch.equal(other, tensor):
            return name
    others.append((health.name, tensor))
    return None
