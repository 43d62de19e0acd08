"""Finds the line of the program that writes to weights outside of the optimizer's step.

May import Lightning.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LIBRARIES = tuple(
    f"{Path(module).parent}/" for module in (torch.__file__, lightning.__file__, __file__)
)


class WriteFinder(TorchFunctionMode):
    """While it is entered, notes which line calls a torch function that changes a parameter.

    Torch functions that are called from compiled code or from C++ are not seen.

    Args:
        parameters: pairs of name and parameter.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> with WriteFinder([("w", weight)]) as finder, torch.no_grad():
    ...     _ = weight.data.mul_(2.0)
    >>> finder.writer(["w"]).startswith("mul_ in ")
    True
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in parameters}
        self._writers: dict[str, str] = {}
        self._entered = False

    def enter(self) -> None:
        """Begins to note writes; another function ends it."""
        self.__enter__()  # type: ignore[no-untyped-call]
        self._entered = True

    def leave(self) -> None:
        """Ends it, if it has begun."""
        if self._entered:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._entered = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a torch function and notes the line if it writes to a parameter."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        writes = name.endswith("_") and not name.endswith("__")
        # Functions of torch.nn.init pass their tensor by name.
        target = args[0] if args else kwargs.get("tensor")
        if (writes or name == "__setitem__") and isinstance(target, Tensor):
            self._note(name, target)
        return func(*args, **kwargs)

    def _note(self, function: str, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        name = self._names.get(tensor.untyped_storage().data_ptr())
        frame = _frame_of_program(sys._getframe(2))
        if name is not None and frame is not None:
            code = frame.f_code
            place = f"{Path(code.co_filename).name}:{frame.f_lineno}"
            self._writers.setdefault(name, f"{function} in {code.co_name}, {place}")

    def writer(self, names: Collection[str]) -> str:
        """Returns the torch function, the caller, file and line that wrote to one; or ""."""
        return next((self._writers[name] for name in names if name in self._writers), "")


def _frame_of_program(frame: FrameType | None) -> FrameType | None:
    """Returns the innermost frame that belongs to neither torch, Lightning nor this package."""
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return frame
