"""Looks from another thread at what the training thread is doing. Imports the standard library."""

from __future__ import annotations

import os
import sys
from types import FrameType

_COLLECTIVES = (
    os.sep + os.path.join("torch", "distributed") + os.sep,
    os.sep + os.path.join("lit_stability", "distributed", "collectives.py"),
)
_COMPILERS = (
    os.path.join("torch", "_dynamo", "convert_frame.py"),
    os.path.join("torch", "_inductor", "compile_fx.py"),
)
_WRAPPERS = ("wrapper", "wait")
"""Functions that say nothing of the collective that they are called for."""


def collective_of(thread: int) -> str:
    """Returns the collective in which a thread waits, "" if the thread is elsewhere.

    Only what Python shows: the collectives of a backward pass run in threads of C++.

    Args:
        thread: its ``threading.get_ident()``.
    """
    frame, name = sys._current_frames().get(thread), ""
    while frame is not None and any(each in frame.f_code.co_filename for each in _COLLECTIVES):
        if not name or frame.f_code.co_name not in _WRAPPERS:
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


def is_compiling(thread: int) -> bool:
    """Returns whether a thread is inside of ``torch.compile``'s compiler.

    Args:
        thread: its ``threading.get_ident()``.
    """
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COMPILERS):
            return True
        frame = frame.f_back
    return False
