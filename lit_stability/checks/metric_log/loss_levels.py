"""The level of a loss over a run, and where it rises for good.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from lit_stability.checks.metric_log.series import Series
from lit_stability.detectors.divergence import Divergence
from lit_stability.detectors.rolling_window import Window
from lit_stability.detectors.trends import ROUNDING

FEWEST = 10
"""Finite losses needed to judge their level."""
_RULE = Divergence()
"""What counts as a rise is the same as in a live run."""


@dataclass(frozen=True)
class LossLevels:
    """Medians of a loss over a window of a tenth of its points, at least 5 and at most 50.

    >>> loss = Series("loss")
    >>> for step, value in enumerate([2.0] * 5 + [1.0] * 20 + [3.0] * 10):
    ...     loss.add(step, value)
    >>> levels = LossLevels.of(loss, len(loss))
    >>> levels.first, levels.last, levels.threshold(), levels.onset(levels.threshold())
    (2.0, 3.0, 1.5, 25)
    """

    values: Sequence[float]
    """Finite losses."""
    places: Sequence[int]
    """Index of each in the series."""
    medians: Sequence[float]
    """Median of the window that ends at each value, from the first whole window on."""
    width: int
    """Points in a window."""

    @classmethod
    def of(cls, series: Series, end: int) -> LossLevels | None:
        """Returns the levels of the finite losses before an index; None if they are too few."""
        places = [i for i in range(end) if math.isfinite(series.values[i])]
        if len(places) < FEWEST:
            return None
        values = [series.values[i] for i in places]
        width = min(50, max(5, len(values) // 10))
        window, medians = Window(width), []
        for value in values:
            window.add(value)
            if len(window) == width:
                medians.append(window.median)
        return cls(values, places, medians, width)

    @property
    def first(self) -> float:
        """Level of the first losses."""
        return median(self.values[:5])

    @property
    def last(self) -> float:
        """Level of the last losses."""
        return self.medians[-1]

    def threshold(self) -> float:
        """Loss that is high beside the lowest level, by the rule of the live detector."""
        lowest = min(self.medians)
        at = self.medians.index(lowest) + self.width
        steps = [abs(b - a) for a, b in pairwise(self.values[max(0, at - 200) : at])]
        sigma = 1.4826 * median(steps) / math.sqrt(2)
        floor = max(_RULE.floor * max(map(abs, self.medians)), ROUNDING)
        return lowest + max(_RULE.rise * abs(lowest), _RULE.sigmas * sigma, floor)

    def onset(self, threshold: float) -> int | None:
        """Returns the index of the first value of the rise that stays; None if there is none."""
        if self.last <= threshold:
            return None
        at = len(self.medians) - 1
        while at > 0 and self.medians[at - 1] > threshold:
            at -= 1
        if at == 0:
            return 0
        place = at + self.width - 1
        while place > 0 and self.values[place - 1] > threshold:
            place -= 1
        return place
