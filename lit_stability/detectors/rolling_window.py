"""The last accepted values of a signal, with robust statistics."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a Gaussian times this is its standard deviation."""

_FEWEST = 9
"""Values that have a trend: three in each third."""


class Window:
    """Median and robust standard deviation of the last ``size`` values.

    >>> w = Window(5)
    >>> for x in (1.0, 2.0, 3.0, 4.0, 100.0):
    ...     w.add(x)
    >>> w.median, w.sigma
    (3.0, 1.4826)
    """

    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque(maxlen=size)
        self._ordered: list[float] | None = None
        """The values by size, from the first time that anybody asks."""
        self._sigma: float | None = None

    def __len__(self) -> int:
        return len(self.values)

    def add(self, value: float) -> None:
        """Take an accepted value; a non-finite one is ignored."""
        if not math.isfinite(value):
            return
        if self._ordered is not None:
            # Sorting anew at every step would take ten times as long.
            if len(self.values) == self.values.maxlen:
                del self._ordered[bisect_left(self._ordered, self.values[0])]
            insort(self._ordered, value)
        self.values.append(value)
        self._sigma = None

    def replace(self, values: Sequence[float]) -> None:
        """Hold these values instead."""
        self.values.clear()
        self.values.extend(values)
        self._ordered = self._sigma = None

    @property
    def median(self) -> float:
        """Median of the window, NaN when it is empty."""
        if self._ordered is None:
            self._ordered = sorted(self.values)
        return _median(self._ordered)

    @property
    def sigma(self) -> float:
        """Standard deviation, estimated from the median absolute deviation."""
        if self._sigma is None:
            centre = self.median
            self._sigma = _MAD_TO_SIGMA * _median(sorted(abs(v - centre) for v in self.values))
        return self._sigma

    @property
    def spread(self) -> float:
        """`sigma` about the trend of the window: what is left of it where values rise or fall.

        The trend is a line bent in the middle, through the medians of the thirds; of the outer two
        Tukey's resistant line is made (Exploratory Data Analysis, 1977, chapter 10). It is made
        anew at every call, in 20 us for 100 values: for what is suspected already.

        >>> w = Window(99)
        >>> for x in range(99):
        ...     w.add(float(x))
        >>> round(w.sigma, 1), w.spread
        (37.1, 0.0)
        """
        values = [*self.values]
        if len(values) < _FEWEST:
            return self.sigma
        left = [v - t for v, t in zip(values, _trend(values), strict=True)]
        centre = _median(sorted(left))
        return _MAD_TO_SIGMA * _median(sorted(abs(v - centre) for v in left))


def _trend(values: Sequence[float]) -> list[float]:
    """The bent line at every value."""
    n, k = len(values), len(values) // 3
    low, middle, high = (_median(sorted(v)) for v in (values[:k], values[k : n - k], values[-k:]))
    centre, arm = (n - 1) / 2, (n - k) / 2
    falls = (middle - low) / arm, (high - middle) / arm
    return [middle + falls[i > centre] * (i - centre) for i in range(n)]


def _median(ordered: Sequence[float]) -> float:
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2 if n else math.nan
