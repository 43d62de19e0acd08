"""Clipping from the norm that was already measured. May import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lit_stability.shards import local


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm by, so that it is at most ``max_norm``.

    ``min(1, max_norm / norm)`` (Pascanu et al. 2013, Algorithm 1).

    >>> clip_coefficient(4.0, 1.0), clip_coefficient(0.5, 1.0)
    (0.25, 1.0)

    Raises:
        ValueError: if the norm is not finite, or ``max_norm`` not positive.
    """
    if not math.isfinite(norm) or not max_norm > 0:
        raise ValueError(f"cannot clip a gradient norm of {norm!r} to {max_norm!r}")
    return 1.0 if norm <= max_norm else max_norm / norm


def scale_gradients(parameters: Iterable[Tensor], coefficient: float) -> None:
    """Multiply every gradient in place."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if coefficient != 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)
