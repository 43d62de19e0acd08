"""Tells exceptions that bad numbers can cause from all others, and finds where one was raised."""

from __future__ import annotations

import re
import sysconfig
import traceback
from functools import cache
from pathlib import Path

import torch

_TYPES: frozenset[type[BaseException]] = frozenset(
    {
        *(Exception, ValueError, RuntimeError, AssertionError, IndexError, KeyError),
        *(ArithmeticError, ZeroDivisionError, OverflowError, FloatingPointError),
        torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    }
)
"""Compared exactly: subclasses are used for the flow of control, or mean something else."""
_OF_THE_MACHINE = re.compile(
    r"out of memory|can(?:'t|not) allocate|CUDA|cuDNN|cuBLAS|HIP error|NCCL|Gloo|ProcessGroup|"
    r"device-side assert|DataLoader worker|expected all tensors to be on the same device",
    re.IGNORECASE,
)
_LONGEST = 120
"""Characters of a message that are quoted."""


def may_come_from_numbers(error: BaseException) -> bool:
    """Returns whether bad values in batch or model can be the reason for an exception.

    They can for the plain numeric exceptions of Python, torch and numpy. An interrupt, a stop, a
    wrong configuration, a lack of memory, a lost device, a class that a program defines itself and
    a programming error such as a `TypeError` have other reasons.

    >>> may_come_from_numbers(ValueError("Expected parameter loc to satisfy Real()"))
    True
    >>> may_come_from_numbers(RuntimeError("CUDA error: an illegal memory access"))
    False
    >>> may_come_from_numbers(TypeError()), may_come_from_numbers(KeyboardInterrupt())
    (False, False)
    """
    kind = type(error)
    of_numpy = kind.__name__ == "LinAlgError" and kind.__module__.startswith("numpy.")
    return (kind in _TYPES or of_numpy) and not _OF_THE_MACHINE.search(str(error))


def quoted(error: BaseException) -> str:
    r"""Returns class and first line of an exception, cut to a readable length.

    >>> quoted(ValueError("loc is not real:\ntensor([nan])"))
    'ValueError: loc is not real:'
    """
    lines = str(error).strip().splitlines()
    text = f": {lines[0]}" if lines else ""
    name = type(error).__name__.lstrip("_")
    return f"{name}{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}"


def raised_at(error: BaseException) -> str:
    """Returns file, line and function of the user's code that raised an exception; or "".

    That is the innermost frame outside of installed packages, of the standard library and of this
    package.
    """
    frames = [(f.f_code, line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = [each for each in frames if not each[0].co_filename.startswith(_libraries())]
    if not own:
        return ""
    code, line = own[-1]
    return f"{Path(code.co_filename).name}:{line} in {code.co_name}"


@cache
def _libraries() -> tuple[str, ...]:
    paths = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    package = Path(__file__).parents[1]
    return (*(f"{path}/" for path in paths if path), f"{package}/", "<frozen")
