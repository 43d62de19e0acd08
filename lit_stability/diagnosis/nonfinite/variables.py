"""Names of tensors: the variables of the program that hold them.

May import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import Tensor

from lit_stability.diagnosis.nonfinite.values import storage_of

_MOST = 64
"""Largest number of elements examined in a container."""


def variable_of(memory: int, frames: Iterable[FrameType]) -> str:
    """Returns the variable that holds a tensor or a view of it, such as ``batch['x']``; else "".

    Args:
        memory: address of the tensor's storage.
        frames: the innermost first. The outermost name is returned, as it is closest to the data.
    """
    for frame in reversed(list(frames)):
        variables = [*frame.f_locals.items(), *_globals_of(frame)]
        # Containers first: a path in the batch says more than the name of a local variable.
        for name, value in sorted(variables, key=lambda v: isinstance(v[1], Tensor)):
            for path, held in _tensors_by_path(name, value):
                if _memory_of(held) == memory:
                    return path
    return ""


def _globals_of(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Yields the global variables that the code of a frame uses."""
    for name in frame.f_code.co_names:
        if name in frame.f_globals:
            yield name, frame.f_globals[name]


def _memory_of(tensor: Tensor) -> int | None:
    try:
        return int(storage_of(tensor)._cdata)
    except (RuntimeError, NotImplementedError):  # tensors without storage
        return None


def _tensors_by_path(path: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in a variable, each with its expression."""
    if isinstance(value, Tensor):
        yield path, value
    elif depth and isinstance(value, Mapping):
        for key, each in list(value.items())[:_MOST]:
            yield from _tensors_by_path(f"{path}[{key!r}]", each, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for i, each in enumerate(value[:_MOST]):
            yield from _tensors_by_path(f"{path}[{i}]", each, depth - 1)
    elif depth and hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for key in value.__dataclass_fields__:
            yield from _tensors_by_path(f"{path}.{key}", getattr(value, key, None), depth - 1)
