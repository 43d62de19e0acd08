"""Detects updates lost to rounding: 16-bit weights that do not move despite their gradients."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.measurement.step_stats import StepStats


class LostUpdates:
    """Warns, once, when most 16-bit weights do not move although their gradient keeps its sign.

    bfloat16 keeps 8 bits: an update below 1/512 of its weight is rounded away (in float16 below
    1/4096). Nothing else shows it: gradients and loss look healthy, the loss only falls too slowly.
    The measured share is of the sampled weights that have not moved in ten updates, among those
    whose gradient kept its sign. The detector warns when the median of ``window`` measurements is
    above ``share``. It ignores measurements while the learning rate is below a tenth of its
    maximum, because updates are meant to vanish at the end of a decay.

    Args:
        share: largest tolerated share of weights that do not move, in (0, 1].
        window: number of measurements; there is one in ten steps.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> steps = [StepStats(step=i, loss=1.0, grad_norm=1.0, stuck_share=0.9) for i in range(3)]
    >>> detector = LostUpdates(window=3)
    >>> for s in steps:
    ...     detector.update(s)
    >>> detector.check(steps[-1]).message
    '90% of the 16-bit weights do not move: their updates are lost to rounding'
    """

    def __init__(self, *, share: float = 0.5, window: int = 10) -> None:
        require(0 < share <= 1, "share", share, "in (0, 1]")
        require(window >= 1, "window", window, "at least 1")
        self.share, self.window = share, window
        self._shares: deque[float] = deque(maxlen=window)
        self._peak = 0.0
        self._reported = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if the median share of weights that do not move is too large."""
        if self._reported or len(self._shares) < self.window or median(self._shares) <= self.share:
            return None
        lost = median(self._shares)
        return Anomaly(
            kind="lost updates",
            step=stats.step,
            value=lost,
            signal="stuck_share",
            threshold=self.share,
            message=f"{lost:.0%} of the 16-bit weights do not move: their updates are lost to "
            "rounding",
            optimizer=stats.optimizer,
            warn_only=True,
        )

    def update(self, stats: StepStats) -> None:
        """Learns the measurement of an accepted step."""
        self._reported = self._reported or self.check(stats) is not None
        self._peak = max(self._peak, stats.update_learning_rate)
        if stats.stuck_share is None or stats.update_learning_rate < 0.1 * self._peak:
            return
        self._shares.append(stats.stuck_share)

    def state_dict(self) -> dict[str, Any]:
        """Returns the recent shares, the peak learning rate, and whether a warning was given."""
        return {"shares": list(self._shares), "peak": self._peak, "told": self._reported}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._shares = deque(map(float, state["shares"]), maxlen=self.window)
        self._peak, self._reported = float(state["peak"]), bool(state["told"])
