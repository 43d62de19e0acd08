"""Updates that rounding swallows: 16-bit weights that stand still while their gradients live."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.measurement.step_stats import StepStats


class LostUpdates:
    """Objects, once, when most 16-bit weights stand still while their gradient pulls.

    bfloat16 keeps 8 bits: an update below 1/512 of its weight is rounded away (in float16 below
    1/4096). Nothing else shows it: gradients and loss look alive, the loss only falls too slowly.
    The share is of sampled weights that have not moved in ten updates, of those whose gradient has
    kept its sign; the objection comes when its median over ``window`` measurements is above
    ``share``. Measurements are left out while the learning
    rate is below a tenth of the largest so far: at the end of a decay updates are to vanish.

    Args:
        share: of weights that stand still, in (0, 1].
        window: measurements, one in ten steps.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> steps = [StepStats(step=i, loss=1.0, grad_norm=1.0, stuck_share=0.9) for i in range(3)]
    >>> detector = LostUpdates(window=3)
    >>> for s in steps:
    ...     detector.update(s)
    >>> detector.check(steps[-1]).message
    '90% of the 16-bit weights stand still: rounding swallows updates'
    """

    def __init__(self, *, share: float = 0.5, window: int = 10) -> None:
        require(0 < share <= 1, "share", share, "in (0, 1]")
        require(window >= 1, "window", window, "at least 1")
        self.share, self.window = share, window
        self._shares: deque[float] = deque(maxlen=window)
        self._peak = 0.0
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        if self._told or len(self._shares) < self.window or median(self._shares) <= self.share:
            return None
        lost = median(self._shares)
        return Anomaly(
            kind="lost updates",
            step=stats.step,
            value=lost,
            signal="stuck_share",
            threshold=self.share,
            message=f"{lost:.0%} of the 16-bit weights stand still: rounding swallows updates",
            optimizer=stats.optimizer,
            warn_only=True,
        )

    def update(self, stats: StepStats) -> None:
        """Take up a measurement; what was objected to is learnt, as it is told of once."""
        self._told = self._told or self.check(stats) is not None
        self._peak = max(self._peak, stats.update_learning_rate)
        if stats.stuck_share is None or stats.update_learning_rate < 0.1 * self._peak:
            return
        self._shares.append(stats.stuck_share)

    def state_dict(self) -> dict[str, Any]:
        """The shares of late."""
        return {"shares": list(self._shares), "peak": self._peak, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._shares = deque(map(float, state["shares"]), maxlen=self.window)
        self._peak, self._told = float(state["peak"]), bool(state["told"])
