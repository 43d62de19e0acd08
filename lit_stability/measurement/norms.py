"""Norms of many tensors in one pass, and the one copy to the host.

May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.step_stats import ProbeReading
from lit_stability.measurement.weight_sampling import real


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
