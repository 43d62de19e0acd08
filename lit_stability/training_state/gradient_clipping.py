"""Gradient clipping that reuses the norm already measured. May import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.norms import MeasuredGradients
from lit_stability.measurement.step_stats import StepStats


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Returns the factor that scales gradients of this norm to at most ``max_norm``.

    ``min(1, max_norm / norm)`` (Pascanu et al. 2013, Algorithm 1).

    >>> clip_coefficient(4.0, 1.0), clip_coefficient(0.5, 1.0)
    (0.25, 1.0)

    Raises:
        ValueError: if the norm is not finite, or ``max_norm`` not positive.
    """
    if not math.isfinite(norm) or not max_norm > 0:
        raise ValueError(
            f"cannot clip norm={norm!r} to max_norm={max_norm!r}; norm must be finite and max_norm "
            "positive"
        )
    return 1.0 if norm <= max_norm else max_norm / norm


def scale_gradients(parameters: Iterable[Tensor], coefficient: float) -> None:
    """Multiplies every gradient by a coefficient, in place."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if coefficient != 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)


_CLIPPED: WeakKeyDictionary[Optimizer, tuple[int, float, float]] = WeakKeyDictionary()
"""For each optimizer: the step its gradients were clipped for, by what factor, to what norm."""


def gradients_are_new(optimizer: Optimizer) -> None:
    """Records that an optimizer has new gradients, which are not clipped yet.

    To be called when they are measured: a step that is retried has the number of the one before.
    """
    _CLIPPED.pop(optimizer, None)


def clip_step(optimizer: Optimizer, stats: StepStats, max_norm: float) -> float:
    """Clips the gradients of the step that is about to be taken, in place.

    If several callbacks clip the same step, the smallest threshold wins in whatever order they
    come: each multiplies by the factor that is missing, and never by one that was applied already.

    Args:
        optimizer: whose gradients to clip.
        stats: of that step, as measured before anything was clipped.
        max_norm: largest norm that they may keep.

    Returns:
        The factor that the measured gradients are multiplied by in total, in (0, 1].

    Raises:
        ValueError: if the norm is not finite, or ``max_norm`` not positive.
    """
    # By the number of the step: a change of regime hands out another StepStats for the same one.
    step, before, smallest = _CLIPPED.get(optimizer, (None, 1.0, math.inf))
    before, smallest = (before, smallest) if step == stats.step else (1.0, math.inf)
    wanted = min(before, clip_coefficient(stats.grad_norm, max_norm))
    if wanted < before:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        scale_gradients(parameters, wanted / before)
    _CLIPPED[optimizer] = (stats.step, wanted, min(smallest, max_norm))
    return wanted


def clip_tensors(
    optimizer: Optimizer,
    stats: StepStats,
    tensors: Mapping[str, Tensor],
    max_norms: Sequence[float],
) -> list[float]:
    """Clips each gradient of the step that is about to be taken by itself, in place.

    What was clipped before counts, and what is clipped later starts from the norm that is left.

    Args:
        optimizer: whose gradients to clip.
        stats: of that step, as measured before anything was clipped.
        tensors: the parameters by name, or what this rank has of them.
        max_norms: largest norm that each gradient may keep, in the order of ``stats.names``.

    Returns:
        The norm of each gradient that is left.
    """
    step, before, smallest = _CLIPPED.get(optimizer, (None, 1.0, math.inf))
    before, smallest = (before, smallest) if step == stats.step else (1.0, math.inf)
    norms = [before * norm for norm in stats.grad_norms]
    left = [min(pair) for pair in zip(norms, max_norms, strict=True)]
    rows = zip(stats.names, norms, left, strict=True)
    cut = [(tensors[name].grad, kept / norm) for name, norm, kept in rows if kept < norm]
    grads = [(local(grad), factor) for grad, factor in cut if grad is not None]
    if grads:
        torch._foreach_mul_([grad for grad, _ in grads], [factor for _, factor in grads])
        total = math.hypot(*left)
        _CLIPPED[optimizer] = (stats.step, total / stats.grad_norm, min(smallest, total))
    return left


def clip_threshold(optimizer: Optimizer, stats: StepStats) -> float | None:
    """Returns the smallest norm that a step was clipped to; None if nothing clipped it.

    Args:
        optimizer: the optimizer that takes the step.
        stats: the measurement of the step.
    """
    step, _, smallest = _CLIPPED.get(optimizer, (None, 1.0, math.inf))
    return smallest if step == stats.step else None


_MARGIN = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Excess of a threshold over the norm, by dtype, from which on rounding cannot make it smaller."""
_LARGEST = 1e4
"""Thresholds beyond it are compared by torch: a norm in fp16 may be infinite there."""


def clip_measured(
    measured: MeasuredGradients, parameters: Sequence[Tensor], max_norm: float
) -> bool:
    """Clips like `torch.nn.utils.clip_grad_norm_`, to the bit, without measuring the norm again.

    Gradients below the threshold are not touched; there, torch multiplies them by 1.

    Args:
        measured: the gradients, as they were measured in this step.
        parameters: those whose gradients to clip together.
        max_norm: largest norm that the gradients may keep.

    Returns:
        Whether it was done. If not, nothing has changed: gradients were written since, others are
        to be clipped too, or their norm cannot be known to the bit without measuring it.

    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> norms = torch.stack(torch._foreach_norm([p.grad]))
    >>> clip_measured(MeasuredGradients([p.grad], norms, 5.0, (), [p.grad._version]), [p], 1.0)
    True
    >>> p.grad
    tensor([0.6000, 0.8000])
    """
    order = _order(measured, [p.grad for p in parameters if p.grad is not None])
    if order is None or not math.isfinite(measured.total):
        return False
    dtypes = {grad.dtype for grad in measured.tensors}
    margin = max(_MARGIN.get(dtype, math.inf) for dtype in dtypes)
    if measured.total * (1 + margin) + 1e-6 <= max_norm <= _LARGEST:
        return True
    if dtypes != {torch.float32} or len({grad.device for grad in measured.tensors}) > 1:
        return False
    total = torch.linalg.vector_norm(_exact_norms(measured)[order], 2.0)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return True


def _order(measured: MeasuredGradients, grads: list[Tensor]) -> Tensor | slice | None:
    """Returns the place of each gradient among the measured ones; None if they are others."""
    if [grad._version for grad in measured.tensors] != measured.versions:
        return None
    theirs, ours = [*map(id, grads)], [*map(id, measured.tensors)]
    if theirs == ours:
        return slice(None)
    place = {key: i for i, key in enumerate(ours)}
    same = len(theirs) == len(ours) and place.keys() == set(theirs)
    return _index(tuple(place[key] for key in theirs), measured.norms.device) if same else None


@lru_cache(maxsize=8)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, as it is the same for every step, and a copy to the device may wait for it."""
    return torch.tensor(places, device=device)


def _exact_norms(measured: MeasuredGradients) -> Tensor:
    if not measured.stacked:
        return measured.norms
    norms = measured.norms.clone()
    again = torch._foreach_norm([measured.tensors[i] for i in measured.stacked], 2.0)
    norms[list(measured.stacked)] = torch.stack(again)
    return norms
