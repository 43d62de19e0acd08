"""A rolling window of accepted values with robust statistics."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a Gaussian times this is its standard deviation."""

_FEWEST = 9
"""Smallest window with a trend: three values in each third."""


class Window:
    """Holds the last ``size`` values; computes their median and robust standard deviation.

    >>> w = Window(5)
    >>> for x in (1.0, 2.0, 3.0, 4.0, 100.0):
    ...     w.add(x)
    >>> w.median, w.sigma
    (3.0, 1.4826)
    """

    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque(maxlen=size)
        self._ordered: list[float] | None = None
        """The values in ascending order; None until a statistic is first needed."""
        self._sigma: float | None = None

    def __len__(self) -> int:
        return len(self.values)

    def add(self, value: float) -> None:
        """Adds an accepted value; a non-finite one is ignored."""
        if not math.isfinite(value):
            return
        if self._ordered is not None:
            # Sorting again at every step would take ten times as long.
            if len(self.values) == self.values.maxlen:
                del self._ordered[bisect_left(self._ordered, self.values[0])]
            insort(self._ordered, value)
        self.values.append(value)
        self._sigma = None

    def replace(self, values: Sequence[float]) -> None:
        """Replaces the content of the window with these values."""
        self.values.clear()
        self.values.extend(values)
        self._ordered = self._sigma = None

    @property
    def median(self) -> float:
        """Median of the window, NaN if it is empty."""
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
        """Robust standard deviation about the trend of the window instead of about its median.

        The trend is a line with a bend in the middle, through the medians of the thirds, after
        Tukey's resistant line (Exploratory Data Analysis, 1977, chapter 10), which uses the outer
        two. Every call computes it again, in 20 us for 100 values, so use it for suspicious values
        only.

        >>> w = Window(99)
        >>> for x in range(99):
        ...     w.add(float(x))
        >>> round(w.sigma, 1), w.spread
        (37.1, 0.0)
        """
        values = [*self.values]
        if len(values) < _FEWEST:
            return self.sigma
        residuals = [v - t for v, t in zip(values, _trend(values), strict=True)]
        centre = _median(sorted(residuals))
        return _MAD_TO_SIGMA * _median(sorted(abs(r - centre) for r in residuals))


def _trend(values: Sequence[float]) -> list[float]:
    """Returns the bent trend line at the place of every value."""
    n, k = len(values), len(values) // 3
    low, middle, high = (_median(sorted(v)) for v in (values[:k], values[k : n - k], values[-k:]))
    centre, arm = (n - 1) / 2, (n - k) / 2
    slopes = (middle - low) / arm, (high - middle) / arm
    return [middle + slopes[i > centre] * (i - centre) for i in range(n)]


def _median(ordered: Sequence[float]) -> float:
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2 if n else math.nan
