"""Clipping to a percentile of recent norms. Imports neither torch nor Lightning."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_stability.detectors.anomaly import require
from lit_stability.policies.clip_rules.rule import teaches


class SortedWindow:
    """The last values, in their order and sorted.

    Adding a value takes two binary searches and two moves of memory.

    >>> window = SortedWindow()
    >>> for value in (9.0, 1.0, 3.0, 2.0):
    ...     window.add(value, size=3)
    >>> window.values(), window.percentile(50), window.percentile(75)
    ([1.0, 3.0, 2.0], 2.0, 2.0)
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float, size: int) -> None:
        """Adds a value, and removes the oldest ones beyond ``size``."""
        self._values.append(value)
        insort(self._sorted, value)
        while len(self._values) > size:
            del self._sorted[bisect_left(self._sorted, self._values.popleft())]

    def percentile(self, q: float) -> float:
        """Returns the ``q``-th percentile, as NumPy's ``method="lower"``: always one of the values.

        An interpolated percentile would depend on the next larger value, which may be a spike.

        Args:
            q: in [0, 100].
        """
        return self._sorted[int((len(self._sorted) - 1) * q / 100)]

    def values(self) -> list[float]:
        """Returns the values, the oldest first."""
        return list(self._values)

    def replace(self, values: Iterable[float], size: int) -> None:
        """Replaces the values by the last ``size`` of these."""
        self._values = deque(list(values)[-size:])
        self._sorted = sorted(self._values)


@dataclass(frozen=True, kw_only=True)
class PercentileClip:
    """Clips to a percentile of the last norms, within bounds.

    After AutoClip (Seetharaman et al. 2020, arXiv 2007.14469). It learns norms before clipping: a
    burst of at most ``(100 - percentile) / 100`` of the known norms (5 of 1000, but 1 of 200) moves
    the threshold no further than to the largest norm before the burst; a longer burst raises it, at
    most to the upper bound.

    Raises:
        ValueError: if an option is out of its range.

    >>> rule = PercentileClip(percentile=50, window=3, bounds=(0.5, 4.0), known_after=2)
    >>> for norm in (1.0, 2.0, 9.0, 9.0):
    ...     print(norm, rule.threshold(norm))
    ...     rule.update(norm)
    1.0 10.0
    2.0 10.0
    9.0 1.0
    9.0 2.0
    """

    percentile: float = 99.5
    """Percentile in (0, 100] of recent norms that is the threshold."""
    window: int = 1000
    """Number of norms kept."""
    bounds: tuple[float, float] = (1.0, 100.0)
    """Smallest and largest threshold."""
    until_known: float = 10.0
    """Threshold until ``known_after`` norms are known; Inf for no clipping."""
    known_after: int = 100
    """Number of norms needed for a percentile."""
    _norms: SortedWindow = field(
        default_factory=SortedWindow, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(self.bounds))
        require(0 < self.percentile <= 100, "percentile", self.percentile, "in (0, 100]")
        require(self.window >= 1, "window", self.window, "at least 1")
        ordered = len(self.bounds) == 2 and 0 < self.bounds[0] <= self.bounds[1]
        require(ordered, "bounds", self.bounds, "(low, high) with 0 < low <= high")
        require(self.until_known > 0, "until_known", self.until_known, "greater than 0")
        enough = 1 <= self.known_after <= self.window
        require(enough, "known_after", self.known_after, f"in 1..window={self.window}")

    def threshold(self, grad_norm: float) -> float:
        """See `ClipRule`; does not depend on ``grad_norm``."""
        if len(self._norms) < self.known_after:
            return self.until_known
        low, high = self.bounds
        return min(max(self._norms.percentile(self.percentile), low), high)

    def update(self, grad_norm: float) -> None:
        """Adds a norm to the window."""
        if teaches(grad_norm):
            self._norms.add(grad_norm, self.window)

    def state_dict(self) -> dict[str, Any]:
        """Returns the window."""
        return {"norms": self._norms.values()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a window, limited to the last ``window`` norms."""
        self._norms.replace(filter(teaches, map(float, state["norms"])), self.window)
