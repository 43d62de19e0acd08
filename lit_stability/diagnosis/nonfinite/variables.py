"""What the program calls a tensor: the variable that holds it.

May import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import Tensor

from lit_stability.diagnosis.nonfinite.values import storage_of

_MOST = 64
"""Elements of a container that are looked at."""


def variable_of(memory: int, frames: Iterable[FrameType]) -> str:
    """The variable that holds a tensor, or a view of it: ``y`` or ``batch['x']``; "" if none does.

    Args:
        memory: address of the tensor's storage.
        frames: the deepest first. The outermost name is given, as it is closest to the data.
    """
    for frame in reversed(list(frames)):
        variables = [*frame.f_locals.items(), *_globals_of(frame)]
        # Containers first: a batch says more than the name that a part of it was given.
        for name, value in sorted(variables, key=lambda v: isinstance(v[1], Tensor)):
            for path, held in _tensors_by_path(name, value):
                if _memory_of(held) == memory:
                    return path
    return ""


def _globals_of(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Global variables that the frame's code names."""
    for name in frame.f_code.co_names:
        if name in frame.f_globals:
            yield name, frame.f_globals[name]


def _memory_of(tensor: Tensor) -> int | None:
    try:
        return int(storage_of(tensor)._cdata)
    except (RuntimeError, NotImplementedError):  # tensors without memory of their own
        return None


def _tensors_by_path(path: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a variable, with the expression that gives each."""
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
