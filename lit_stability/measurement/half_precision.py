"""Conversion of tensors in the two 16-bit formats. May import torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
"""The two 16-bit dtypes."""


@torch.no_grad()
def widen(tensors: Iterable[Tensor]) -> None:
    """Converts half-precision tensors to float32 in place: each object keeps its identity."""
    for tensor in tensors:
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()


def cast(value: Any, dtype: torch.dtype, of: Sequence[torch.dtype] = HALF) -> Any:
    """Returns the value with all tensors of the dtypes ``of`` cast to ``dtype``.

    Dicts, lists and tuples are rebuilt; anything else is returned unchanged.

    >>> cast([torch.zeros(1, dtype=torch.float16), "x"], torch.float32)[0].dtype
    torch.float32
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in of else value
    if isinstance(value, dict):
        return type(value)((k, cast(v, dtype, of)) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(v, dtype, of) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)([cast(v, dtype, of) for v in value])
    return value
