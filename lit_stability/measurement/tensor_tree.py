"""Finds the tensors in a batch of any structure. May import torch but not Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested containers and in the attributes of batch objects.

    >>> import torch
    >>> [t.numel() for t in tensors_in({"x": torch.zeros(3), "more": [torch.zeros(2), "text"]})]
    [3, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for item in vars(value).values():
            if isinstance(item, (Tensor, Mapping, list, tuple)):
                yield from tensors_in(item)


def size_of(value: Any) -> int:
    """Returns the size of all tensors in a batch, in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors_in(value))
