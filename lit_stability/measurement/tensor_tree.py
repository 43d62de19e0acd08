"""Finds the tensors in a batch of any structure. May import torch but not Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

DEEPEST = 8
"""Objects inside of one another that are followed."""
_OPAQUE = (str, bytes, type, FunctionType, MethodType, ModuleType, nn.Module, Dataset, DataLoader)
"""What a batch may refer to without that its tensors are part of the batch."""
PLAIN_TYPES = frozenset({bool, bytes, float, int, str, type(None)})
"""Types of values without parts."""
_FOREIGN = (
    "builtins",
    "collections",
    "datetime",
    "decimal",
    "numpy",
    "pathlib",
    "torch",
    "weakref",
)
"""Packages whose objects hold no tensors of a batch in their attributes."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested containers and in the attributes of batch objects.

    Objects are dataclasses, with slots or without, graphs, and objects inside of them. An object
    that refers to one that holds it is followed once.

    >>> import torch
    >>> [t.numel() for t in tensors_in({"x": torch.zeros(3), "more": [torch.zeros(2), "text"]})]
    [3, 2]
    """
    return (tensor for _, tensor in named_tensors(value))


def named_tensors(
    value: Any, name: str = "batch", *, _inside: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors as `tensors_in`, each with its path.

    >>> import torch
    >>> [name for name, _ in named_tensors({"x": torch.zeros(2), "more": [torch.ones(1)]})]
    ["batch['x']", "batch['more'][0]"]
    """
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) in _inside or len(_inside) >= DEEPEST:
        return
    for part, item in parts_of(value):
        yield from named_tensors(item, name + part, _inside=_inside | {id(value)})


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the items of a container, or the attributes of a batch object, with their paths."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{key}", item) for key, item in zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif not isinstance(value, _OPAQUE) and type(value).__module__.split(".")[0] not in _FOREIGN:
        yield from ((f".{key}", item) for key, item in attributes_of(value).items())


def attributes_of(value: Any) -> dict[str, Any]:
    """Returns the attributes that an object holds itself, in slots too.

    >>> from dataclasses import dataclass
    >>> @dataclass(slots=True)
    ... class Point:
    ...     x: int
    >>> attributes_of(Point(3))
    {'x': 3}
    """
    slots: dict[str, Any] = {}
    for base in reversed(type(value).__mro__):
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                slots[name] = getattr(value, name)
    return {**slots, **getattr(value, "__dict__", {})}


def size_of(value: Any, *, _inside: tuple[int, ...] = ()) -> int:
    """Returns the size of all tensors and numpy arrays in a batch, in bytes.

    >>> import torch
    >>> size_of({"x": torch.zeros(3), "y": [np.zeros(2), "text"]})
    28
    """
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if type(value) in PLAIN_TYPES:
        return 0
    if isinstance(value, np.ndarray):
        return value.nbytes
    if id(value) in _inside or len(_inside) >= DEEPEST:
        return 0
    inside = (*_inside, id(value))
    parts = value if type(value) in (list, tuple) else [part for _, part in parts_of(value)]
    return sum([size_of(part, _inside=inside) for part in parts])
