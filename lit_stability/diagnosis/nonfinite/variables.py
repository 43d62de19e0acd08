"""Names of tensors: the variables of the program that hold them.

May import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn

from lit_stability.diagnosis.nonfinite.values import storage_of
from lit_stability.lightning_choice import LIGHTNING_ROOTS

_MOST = 64
"""Largest number of elements examined in a container."""
_PACKAGES = ("builtins", "torch", *LIGHTNING_ROOTS)
"""Packages whose objects hold no constants of the user's program."""


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


def is_argument(memory: int, frames: Iterable[FrameType]) -> bool:
    """Returns whether a tensor was given to the step, alone or in a batch.

    Args:
        memory: address of the tensor's storage.
        frames: the innermost first. The arguments of the step are those of the outermost function
            that was given a tensor.
    """
    given = (_arguments_of(frame) for frame in reversed(list(frames)))
    return memory in next(filter(None, given), set())


def _arguments_of(frame: FrameType) -> set[int | None]:
    """Returns the memory of the tensors that a function was given."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {
        _memory_of(tensor)
        for name in names
        for _, tensor in _tensors_by_path(name, frame.f_locals.get(name))
    }


def attributes_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the plain tensors that modules hold as attributes, each with its path.

    Neither parameters nor buffers: class weights in a list, or in a loss that is no module.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(1, 1))
    >>> model[0].weights = [torch.ones(2)]
    >>> [name for name, _ in attributes_of(model)]
    ['0.weights[0]']
    """
    for path, module in model.named_modules():
        for key, value in list(vars(module).items()):
            if not key.startswith("_"):
                yield from _of_attribute(f"{path}.{key}" if path else key, value)


def _of_attribute(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _tensors_by_path(path, value)
    is_foreign = type(value).__module__.partition(".")[0] in _PACKAGES
    if isinstance(value, (nn.Module, Mapping, type)) or is_foreign:
        return
    for key, each in list(getattr(value, "__dict__", {}).items())[:_MOST]:
        yield from _tensors_by_path(f"{path}.{key}", each, depth=1)


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
