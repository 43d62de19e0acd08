"""Runs that never began to learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.trends import LearningRateTrend, LossTrend
from lit_stability.measurement.step_stats import StepStats


class NoLearning:
    """Objects, once, to a loss that has never fallen below its first values.

    The question is put after ``patience`` steps with a settled learning rate; a warm-up does not
    count, nor steps below half the peak. Fallen it has when the median of a block of ``block``
    losses was below the first by four standard errors and by ``fall`` of its size (`LossTrend`).
    A run that once has learnt is never objected to: it may have a plateau. Nor is one whose medians
    trend down, if too little yet to count.

    Three things can be the matter, and ``signal`` tells them apart:

    * ``update_ratio``: the weights do not move; the mean update is below ``still`` of their norm;
    * ``weight_path``: all updates together could have moved them by less than ``little`` of it;
    * ``loss``: the weights do move, and the loss stands all the same.

    Where a loss says nothing of success, as in adversarial training, this objection is one
    to expect.

    Args:
        patience: optimizer steps.
        block: losses per median.
        fall: smallest fall that counts, as a share of the first loss's absolute value.
        still: update-to-weight ratio, as a mean over the steps that count; fp32 rounds away
            updates below 6e-8 of a weight.
        little: sum of update-to-weight ratios over the whole run.

    Raises:
        ValueError: if an argument is out of its range.

    >>> d = NoLearning(patience=100)
    >>> for i in range(300):
    ...     stats = StepStats(step=i, loss=2.3 + i % 3 / 10, grad_norm=1.0, update_ratio=1e-5)
    ...     if anomaly := d.check(stats):
    ...         print(i, anomaly.signal, anomaly.message)
    ...     d.update(stats)
    149 weight_path loss 2.4 began at 2.4; 149 updates have moved the weights by at most 0.15%
    """

    shared_by_ranks = "yes"

    def __init__(
        self,
        *,
        patience: int = 500,
        block: int = 50,
        fall: float = 0.01,
        still: float = 1e-8,
        little: float = 1e-2,
    ) -> None:
        require(patience >= 1, "patience", patience, "at least 1")
        require(still >= 0, "still", still, "at least 0")
        require(little >= still, "little", little, f"at least still={still}")
        self.patience, self.still, self.little = patience, still, little
        self._rate, self._trend = LearningRateTrend(), LossTrend(block=block, fall=fall)
        self._counted = 0
        self._updates = 0
        self._path = 0.0
        """Sum of all update ratios."""
        self._stable_path = 0.0
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        trend = self._trend
        if self._told or trend.learnt or trend.falling or self._counted < self.patience:
            return None
        if not stats.has_loss or math.isnan(trend.recent):
            return None
        signal, value, why = self._reason()
        return Anomaly(
            kind="no learning",
            step=stats.step,
            value=value if signal != "loss" else trend.recent,
            signal=signal,
            baseline=trend.first if signal == "loss" else None,
            threshold={"update_ratio": self.still, "weight_path": self.little}.get(signal),
            optimizer=stats.optimizer,
            warn_only=True,
            message=f"loss {trend.recent:.4g} began at {trend.first:.4g}; {why}",
        )

    def _reason(self) -> tuple[str, float, str]:
        """The signal, its value, and what to say of it."""
        if not self._updates:
            return "loss", math.nan, "how far the weights move is not known"
        mean = self._stable_path / self._counted
        if mean < self.still:
            rate = self._rate.rate
            return (
                "update_ratio",
                mean,
                f"the weights do not move, at a learning rate of {rate:.3g}",
            )
        if self._path < self.little:
            by = f"{self._updates} updates have moved the weights by at most {self._path:.2%}"
            return "weight_path", self._path, by
        return "loss", mean, f"the weights do move, by {mean:.2g} of their norm a step"

    def update(self, stats: StepStats) -> None:
        """Learn an accepted step; what was objected to is told of once."""
        if self._told or self._trend.learnt:
            return
        self._told = self.check(stats) is not None
        self._rate.update(stats)
        self._trend.update(stats.loss)
        moved = stats.update_ratio
        if moved is not None and math.isfinite(moved):
            self._updates += 1
            self._path += moved
        if self._rate.stable:
            self._counted += 1
            self._stable_path += moved if moved is not None and math.isfinite(moved) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The courses, the counts, and whether it was told."""
        return {
            "rate": self._rate.state_dict(),
            "course": self._trend.state_dict(),
            "counted": self._counted,
            "updates": self._updates,
            "path": self._path,
            "settled_path": self._stable_path,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._rate.load_state_dict(state["rate"])
        self._trend.load_state_dict(state["course"])
        self._counted, self._updates = int(state["counted"]), int(state["updates"])
        self._path, self._stable_path = float(state["path"]), float(state["settled_path"])
        self._told = bool(state["told"])
