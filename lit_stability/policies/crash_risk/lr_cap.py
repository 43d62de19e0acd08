"""A bound on the learning rate that alarms lower and calm raises, whatever a scheduler writes.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Rates: TypeAlias = Mapping[int, Sequence[float]]
"""Learning rate of each parameter group, by optimizer."""

_LEAST = 1 / 64
"""No rate is bound to less than this share of its schedule."""


class LearningRateCap:
    """Keeps learning rates at or below what they were bound to.

    A factor would follow a schedule that climbs, or jumps, to where the run cannot live; a bound
    does not, and lets a schedule that falls below it have its way. There is none at first.

    >>> lr_cap = LearningRateCap()
    >>> lr_cap.lower({0: [0.8]})
    >>> lr_cap.factors({0: [1.6]}), lr_cap.factors({0: [0.1]})
    ({0: (0.25,)}, {0: (1.0,)})
    """

    def __init__(self) -> None:
        self._bounds: dict[int, tuple[float, ...]] = {}

    @property
    def active(self) -> bool:
        """Whether anything is bound."""
        return bool(self._bounds)

    def factors(self, scheduled: Rates) -> dict[int, tuple[float, ...]]:
        """What to multiply each scheduled learning rate by, in (0, 1]."""
        return {
            optimizer: tuple(
                min(1.0, max(bound / rate, _LEAST)) if rate > 0 else 1.0
                for bound, rate in zip(self._bounds_of(optimizer, rates), rates, strict=True)
            )
            for optimizer, rates in scheduled.items()
        }

    def can_lower(self, scheduled: Rates) -> bool:
        """Whether a rate is still above the least share of its schedule."""
        factors = self.factors(scheduled).values()
        return any(factor > _LEAST for each in factors for factor in each)

    def lower(self, scheduled: Rates) -> None:
        """Bind to half of what the rates are now, under the bounds in force."""
        factors = self.factors(scheduled)
        self._bounds = {
            optimizer: tuple(r * f / 2 for r, f in zip(rates, factors[optimizer], strict=True))
            for optimizer, rates in scheduled.items()
        }

    def raise_(self, scheduled: Rates) -> None:
        """Raise the bounds by half, and let go of them where that is no bound any more.

        The first raise stays below the rates that were cut, the second is above them.
        """
        self._bounds = {i: tuple(1.5 * b for b in bounds) for i, bounds in self._bounds.items()}
        if all(factor == 1 for each in self.factors(scheduled).values() for factor in each):
            self._bounds = {}

    def _bounds_of(self, optimizer: int, rates: Sequence[float]) -> Sequence[float]:
        found = self._bounds.get(optimizer, ())
        # Groups that were added since, or others than those of a checkpoint, are not bound.
        return found if len(found) == len(rates) else rates

    def state_dict(self) -> dict[str, list[float]]:
        """The bounds."""
        return {str(optimizer): list(bounds) for optimizer, bounds in self._bounds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._bounds = {int(i): tuple(map(float, bounds)) for i, bounds in state.items()}
