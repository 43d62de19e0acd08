"""Tells from the losses whether a run learns again after an incident.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

_WINDOW = 20
"""Accepted steps whose median loss is compared."""
_SPREADS = 3.0
"""Usual deviations from the median by which the loss may be higher than before an incident."""
_RELATIVE = 0.02
"""The same as a share of the loss, for losses that hardly vary."""


@dataclass(frozen=True)
class Level:
    """Where the losses of a few steps lie."""

    middle: float
    """Their median."""
    spread: float
    """Median distance from it."""

    @classmethod
    def of(cls, losses: Iterable[float]) -> Level | None:
        """Returns the level of the finite losses; None if there is none.

        >>> Level.of([1.0, 2.0, 9.0, float("nan")])
        Level(middle=2.0, spread=1.0)
        """
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            return None
        middle = median(finite)
        return cls(middle, median(abs(loss - middle) for loss in finite))


def is_back(after: Level, before: Level | None) -> bool:
    """Returns whether the loss is again as low as before an incident; True if that is not known."""
    if before is None:
        return True
    tolerance = max(_SPREADS * before.spread, _RELATIVE * abs(before.middle))
    return after.middle <= before.middle + tolerance


def has_learnt(after: Level, start: Level | None) -> bool:
    """Returns whether the loss is below that of the first steps; True if these are not known."""
    return start is None or after.middle < start.middle - start.spread


class LossLevels:
    """The losses of the accepted steps of a fit: the first ones, and the last ones.

    Args:
        from_start: whether the fit is one from its first step on; a resumed one may have learnt
            before, so nothing is known of its first losses.

    >>> levels = LossLevels(from_start=True)
    >>> for step in range(60):
    ...     levels.add(step, 1.0 if step < 30 else 0.5)
    >>> levels.start.middle, levels.now.middle, levels.since(59).middle
    (1.0, 0.5, 0.5)
    """

    def __init__(self, *, from_start: bool) -> None:
        self._first: list[float] | None = [] if from_start else None
        self._last: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self.rate_is_cut = False
        """Whether the learning rate is cut so far that nothing is learnt."""

    def add(self, step: int, loss: float) -> None:
        """Adds an accepted step.

        Args:
            step: optimizer steps before it.
            loss: of the step.
        """
        if self._first is not None and len(self._first) < _WINDOW:
            self._first.append(loss)
        self._last.append((step, loss))

    @property
    def start(self) -> Level | None:
        """Level of the first steps; None if it is not known."""
        return None if self._first is None else Level.of(self._first)

    @property
    def now(self) -> Level | None:
        """Level of the last steps."""
        return Level.of(loss for _, loss in self._last)

    def since(self, step: int) -> Level | None:
        """Level of those of the last steps that are not before a step."""
        return Level.of(loss for at, loss in self._last if at >= step)

    def learns(self, after: Level | None, before: Level | None, *, lowered: bool) -> bool:
        """Returns whether the run learns again.

        Its loss must be back at the level from before the incident. Where learning rate or clip
        were lowered, that is not enough: a run that is kept at chance level must have learnt
        something since its start.

        Args:
            after: level since the incident; None if no loss is known.
            before: level before it.
            lowered: whether a response lowered learning rate or clip.
        """
        if after is None:
            return True
        if lowered and (self.rate_is_cut or not has_learnt(after, self.start)):
            return False
        return is_back(after, before)
