"""Tensors in the two 16-bit formats, and the way out of them. May import torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def widen(tensors: Iterable[Tensor]) -> None:
    """Turn half-precision tensors into float32, each remaining the object that it is."""
    for tensor in tensors:
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()


def cast(value: Any, dtype: torch.dtype, of: Sequence[torch.dtype] = HALF) -> Any:
    """The value with its tensors of some formats in another; containers are rebuilt.

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
