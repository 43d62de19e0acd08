"""A cap on the learning rate, lowered on alarms and raised on calm steps.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Rates: TypeAlias = Mapping[int, Sequence[float]]
"""Optimizer index -> learning rate of each parameter group."""

_LEAST = 1 / 64
"""Smallest factor on a scheduled learning rate."""


class LearningRateCap:
    """Keeps learning rates at or below a bound per group; there is no bound at first.

    A factor would still follow a schedule that rises to a value at which the run diverges; a bound
    does not, and it has no effect on a schedule that falls below it.

    >>> lr_cap = LearningRateCap()
    >>> lr_cap.lower({0: [0.8]})
    >>> lr_cap.factors({0: [1.6]}), lr_cap.factors({0: [0.1]})
    ({0: (0.25,)}, {0: (1.0,)})
    """

    def __init__(self) -> None:
        self._bounds: dict[int, tuple[float, ...]] = {}

    @property
    def active(self) -> bool:
        """Whether there is a bound."""
        return bool(self._bounds)

    def factors(self, scheduled: Rates) -> dict[int, tuple[float, ...]]:
        """Returns the factor in (0, 1] on each scheduled learning rate."""
        return {
            optimizer: tuple(
                min(1.0, max(bound / rate, _LEAST)) if rate > 0 else 1.0
                for bound, rate in zip(self._bounds_of(optimizer, rates), rates, strict=True)
            )
            for optimizer, rates in scheduled.items()
        }

    def can_lower(self, scheduled: Rates) -> bool:
        """Returns whether any learning rate is above its smallest allowed share of the schedule."""
        factors = self.factors(scheduled).values()
        return any(factor > _LEAST for groups in factors for factor in groups)

    def lower(self, scheduled: Rates) -> None:
        """Sets the bounds to half the current learning rates, which present bounds may limit."""
        factors = self.factors(scheduled)
        self._bounds = {
            optimizer: tuple(r * f / 2 for r, f in zip(rates, factors[optimizer], strict=True))
            for optimizer, rates in scheduled.items()
        }

    def raise_(self, scheduled: Rates) -> None:
        """Raises the bounds by half, and removes them if they no longer have an effect.

        After the first raise they are below the rates that were cut, after the second above.
        """
        self._bounds = {i: tuple(1.5 * b for b in bounds) for i, bounds in self._bounds.items()}
        if all(factor == 1 for groups in self.factors(scheduled).values() for factor in groups):
            self._bounds = {}

    def _bounds_of(self, optimizer: int, rates: Sequence[float]) -> Sequence[float]:
        found = self._bounds.get(optimizer, ())
        # Bounds do not apply if groups were added since, or differ from those of a checkpoint.
        return found if len(found) == len(rates) else rates

    def state_dict(self) -> dict[str, list[float]]:
        """Returns the bounds."""
        return {str(optimizer): list(bounds) for optimizer, bounds in self._bounds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the bounds."""
        self._bounds = {int(i): tuple(map(float, bounds)) for i, bounds in state.items()}
