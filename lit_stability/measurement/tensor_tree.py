"""The tensors of a batch, whatever it is made of. May import torch; knows no Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in containers, and in the attributes of batch objects.

    >>> import torch
    >>> [t.numel() for t in tensors_in({"x": torch.zeros(3), "more": [torch.zeros(2), "text"]})]
    [3, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for each in vars(value).values():
            if isinstance(each, (Tensor, Mapping, list, tuple)):
                yield from tensors_in(each)


def size_of(value: Any) -> int:
    """Bytes of the tensors in a batch."""
    return sum(t.numel() * t.element_size() for t in tensors_in(value))
