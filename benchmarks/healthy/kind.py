"""One kind of healthy practice: what it is, what to train, and how its health is judged.

Imports Lightning and torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning.pytorch import Callback

from benchmarks.healthy.networks import Net, regression

WRITES = "weights written on purpose"
GRADIENTS = "large gradients that harm nothing"
LOSSES = "losses at zero, near zero or negative"
SCHEDULES = "schedules"
LOOPS = "training loops"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A healthy practice, as a module, data and options of the Trainer."""

    name: str
    group: str
    """One of the groups of this module, for the table."""
    practice: str
    """What users do, in one sentence."""
    module: Callable[[], Net]
    """Creates the module; called after the seed is set."""
    data: Callable[[int], Any] = regression
    """Creates the training data from a seed."""
    held_out: Callable[[int], Any] | None = None
    """Creates the validation data from a seed; None runs no validation."""
    steps: int = 240
    """Value of ``max_steps``, in optimizer steps."""
    trainer: Callable[[], dict[str, Any]] = dict
    """Creates further options of the Trainer."""
    callbacks: Callable[[], list[Callback]] = list
    """Creates callbacks that belong to the practice; they come before those of the suite."""
    fits: int = 1
    """Number of fits in a row, with one module and one list of callbacks."""
    floor: float | None = None
    """Highest final value of a run that begins at its floor; None: the value must fall."""


def is_healthy(values: list[float], floor: float | None) -> bool:
    """Returns whether the values fall by a tenth, or end at the floor or below.

    The first tenth of the values is compared with the last tenth, by their medians.

    Args:
        values: What `Net.track` recorded: a loss, or another value that falls as training succeeds.
        floor: See `Kind.floor`.

    >>> is_healthy([2.0] * 10 + [1.0] * 10, None), is_healthy([1.0] * 20, None)
    (True, False)
    >>> is_healthy([0.0] * 20, 0.0), is_healthy([], None)
    (True, False)
    """
    if not values:
        return False
    first, last = start_and_end(values)
    return last <= floor if floor is not None else last < first - 0.1 * abs(first)


def start_and_end(values: list[float]) -> tuple[float, float]:
    """Returns the medians of the first and of the last tenth of the values.

    >>> start_and_end([3.0, 2.0, 1.0])
    (3.0, 1.0)
    """
    count = max(1, len(values) // 10)
    return median(values[:count]), median(values[-count:])
