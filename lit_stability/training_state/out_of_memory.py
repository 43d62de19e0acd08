"""Tells whether memory is exhausted; frees what an exception holds. May not import Lightning."""

from __future__ import annotations

import re
import traceback

import torch

_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the device or the host had no memory left.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def forget_locals(error: BaseException) -> None:
    """Clears the local variables in the frames of an exception and of its causes.

    The traceback keeps its files and lines, so the exception can still be raised and read.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        pending += [current.__cause__, current.__context__]
