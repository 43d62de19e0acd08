"""Classifies the exception that ended a fit, and finds where it was raised.

May import torch, but not Lightning.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from lit_stability.checks.preflight.report import PreflightError
from lit_stability.compat import empty_device_cache
from lit_stability.incidents import TrainingStopped
from lit_stability.training_state.out_of_memory import is_out_of_memory

Kind = Literal["out of memory", "instability", "data", "device", "other"]

_FETCH, _EVALUATION = (
    tuple(f"/{package}/loops/{file}" for package in ("lightning/pytorch", "pytorch_lightning"))
    for file in ("fetchers.py", "evaluation_loop.py")
)
_NONFINITE = re.compile(r"\bnans?\b|\bnon-?finite\b|\bnot finite\b", re.IGNORECASE)
_LOST_DEVICE = re.compile(r"(CUDA|HIP) error|device-side assert|cuDNN error", re.IGNORECASE)
_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker")
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid")


@dataclass(frozen=True, kw_only=True)
class Crash:
    """Description of an exception from ``Trainer.fit``, without references to its objects."""

    attempt: int
    """Number of the fit that it ended, from 1."""
    kind: Kind
    error: str
    """Class name of the exception."""
    message: str
    """First line of its message; the last line if a DataLoader worker raised it."""
    place: str
    """File, line and function that raised it."""
    step: int
    epoch: int
    batch_idx: int
    """The batch that was being fetched or trained on."""
    samples: tuple[object, ...] | None = None
    """Indices that the sampler requested, if fetching failed and they are known."""
    in_a_row: int = 1
    """Number of crashes since the last progress, this one included."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """Returns what stays equal when a deterministic crash recurs."""
        return self.error, self.place, self.step

    def in_words(self) -> str:
        """Returns the crash as one line of text."""
        where = f"step {self.step} (epoch {self.epoch}, batch {self.batch_idx})"
        text = f": {self.message}" if self.message else ""
        return f"crash {self.in_a_row} at {where}: {self.kind}: {self.error}{text}"


def kind_of(error: BaseException) -> Kind:
    """Returns the kind of crash that an exception indicates.

    >>> kind_of(MemoryError()), kind_of(RuntimeError("Function 'ExpBackward0' returned nan values"))
    ('out of memory', 'instability')
    """
    text = str(error)
    at_start = isinstance(error, TrainingStopped) and error.incident.at_start
    if at_start or isinstance(error, PreflightError):
        # Whatever the cause: nothing was trained yet, so a lower learning rate cannot help.
        return "other"
    if isinstance(error, TrainingStopped):
        return "instability"
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, RuntimeError) and _LOST_DEVICE.search(text):
        return "device"
    if _while_fetching(error):
        # A killed worker does not mean that the data it was reading are bad.
        return "other" if _DEAD_WORKER.search(text) else "data"
    if isinstance(error, (RuntimeError, ValueError, ArithmeticError)) and _NONFINITE.search(text):
        return "instability"
    return "other"


def place_of(error: BaseException) -> str:
    """Returns file, line and function that raised the exception; "" if it was never raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return ""
    frame, line = frames[-1]
    return f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"


def headline(error: BaseException) -> str:
    r"""Returns the most informative line of its message, cut to 500 characters.

    >>> headline(ValueError("Caught OSError in DataLoader worker process 0.\n...\nOSError: 7"))
    'OSError: 7'
    """
    lines = str(error).strip().splitlines() or [""]
    return lines[-1 if _FROM_WORKER.match(lines[0]) else 0][:500]


def _while_fetching(error: BaseException) -> bool:
    """Returns whether it was raised while fetching a training batch."""
    files = [f.f_code.co_filename.replace("\\", "/") for f in _frames(error)]
    fetching = any(file.endswith(_FETCH) for file in files)
    return fetching and not any(file.endswith(_EVALUATION) for file in files)


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def free_memory() -> None:
    """Collects garbage and returns cached blocks of memory to the device."""
    gc.collect()
    empty_device_cache()
