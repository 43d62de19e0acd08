"""What ended a fit: which kind of trouble an exception means, and where it was raised.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import torch

from lit_stability.checks.preflight.report import PreflightError
from lit_stability.incidents import TrainingStopped

Kind = Literal["out of memory", "instability", "data", "device", "other"]

_FETCH = "lightning/pytorch/loops/fetchers.py"
_EVALUATION = "lightning/pytorch/loops/evaluation_loop.py"
_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_NONFINITE = re.compile(r"\bnans?\b|\bnon-?finite\b|\bnot finite\b", re.IGNORECASE)
_LOST_DEVICE = re.compile(r"(CUDA|HIP) error|device-side assert|cuDNN error", re.IGNORECASE)
_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker")
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid")


@dataclass(frozen=True, kw_only=True)
class Crash:
    """An exception that came out of ``Trainer.fit``, without what it keeps alive."""

    attempt: int
    """Which fit it ended, from 1."""
    kind: Kind
    error: str
    """Name of its class."""
    message: str
    """Its first line; of one that a worker sent, the last."""
    place: str
    """File, line and function that raised it."""
    step: int
    epoch: int
    batch_idx: int
    """The batch that was being fetched or trained on."""
    samples: tuple[object, ...] | None = None
    """What the sampler asked of the data set, where fetching failed and it is known."""
    in_a_row: int = 1
    """Crashes since the last progress, this one included."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """What a deterministic crash has in common with its return."""
        return self.error, self.place, self.step

    def in_words(self) -> str:
        """What happened, on one line."""
        where = f"step {self.step} (epoch {self.epoch}, batch {self.batch_idx})"
        text = f": {self.message}" if self.message else ""
        return f"crash {self.in_a_row} at {where}: {self.kind}: {self.error}{text}"


def kind_of(error: BaseException) -> Kind:
    """Which kind of trouble an exception means.

    >>> kind_of(MemoryError()), kind_of(RuntimeError("Function 'ExpBackward0' returned nan values"))
    ('out of memory', 'instability')
    """
    text = str(error)
    if isinstance(error, TrainingStopped):
        return "instability"
    if isinstance(error, PreflightError):
        # Whatever it names: nothing was trained, and no learning rate mends it.
        return "other"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    if isinstance(error, RuntimeError) and _MEMORY.search(text):
        return "out of memory"
    if isinstance(error, RuntimeError) and _LOST_DEVICE.search(text):
        return "device"
    if _while_fetching(error):
        # A worker that was killed says nothing about the data it was reading.
        return "other" if _DEAD_WORKER.search(text) else "data"
    if isinstance(error, (RuntimeError, ValueError, ArithmeticError)) and _NONFINITE.search(text):
        return "instability"
    return "other"


def place_of(error: BaseException) -> str:
    """File, line and function that raised it; empty for one that never was."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return ""
    frame, line = frames[-1]
    return f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"


def headline(error: BaseException) -> str:
    r"""The line of its message that says most, at most 500 characters of it.

    >>> headline(ValueError("Caught OSError in DataLoader worker process 0.\n...\nOSError: 7"))
    'OSError: 7'
    """
    lines = str(error).strip().splitlines() or [""]
    return lines[-1 if _FROM_WORKER.match(lines[0]) else 0][:500]


def _while_fetching(error: BaseException) -> bool:
    """Whether it came out of fetching a batch to train on."""
    files = [f.f_code.co_filename.replace("\\", "/") for f in _frames(error)]
    fetching = any(file.endswith(_FETCH) for file in files)
    return fetching and not any(file.endswith(_EVALUATION) for file in files)


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def forget_locals(error: BaseException) -> None:
    """Clear what the frames of an exception, and of those behind it, keep alive.

    The traceback keeps its files and lines, so that the exception can still be raised and read.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        waiting += [each.__cause__, each.__context__]


def free_memory() -> None:
    """Collect what nobody refers to any more, and hand cached blocks back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
