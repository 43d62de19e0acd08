"""How far a rerun may differ from training. Imports neither torch nor Lightning."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

_MARGIN = 10.0
"""Factor on the largest difference that was seen in healthy audits."""
_USELESS = 0.1
"""Relative difference from which on a comparison finds next to nothing."""


class _Different(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def relative(self) -> float: ...


D = TypeVar("D", bound=_Different)


class Tolerance:
    """Largest relative difference of each tensor that counts as equal.

    As long as no difference was learnt, numbers must have the same bits.

    >>> from lit_stability.measurement.bit_patterns import Difference
    >>> noise = Difference("w", 3, (0,), 1e-7, 8)
    >>> tolerance = Tolerance()
    >>> len(tolerance.beyond([noise]))
    1
    >>> tolerance.learn([noise]); len(tolerance.beyond([noise]))
    0
    """

    def __init__(self) -> None:
        self._limits: dict[str, float] = {}

    @property
    def exact(self) -> bool:
        """Whether numbers must have the same bits."""
        return not self._limits

    @property
    def typical(self) -> float:
        """Median of the tolerances; 0 if numbers must have the same bits."""
        return statistics.median(self._limits.values()) if self._limits else 0.0

    @property
    def useless(self) -> bool:
        """Whether differences are tolerated that are as large as those that matter."""
        return self.typical > _USELESS

    def beyond(self, differences: Iterable[D]) -> list[D]:
        """Returns the differences that are larger than tolerated."""
        if self.exact:
            return list(differences)
        other = self.typical
        return [d for d in differences if d.relative > self._limits.get(d.name, other)]

    def learn(self, differences: Sequence[_Different]) -> None:
        """Tolerates differences like these from now on, with a margin."""
        for each in differences:
            limit = max(self._limits.get(each.name, 0.0), _MARGIN * each.relative)
            self._limits[each.name] = limit
