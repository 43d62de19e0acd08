"""Trends of a run: whether its learning rate is stable, and whether its loss still falls.

Shared by the detectors that need a loss that has stopped falling. Imports neither torch nor
Lightning.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import require
from lit_stability.measurement.step_stats import StepStats

ROUNDING = 1e-6
"""Losses are sums of terms of about 1 in float32: less than this, 8 times its epsilon of 1.2e-7,
may be rounding."""


class LearningRateTrend:
    """Tracks the largest nominal learning rate of an optimizer.

    The rate is *stable* if it has not exceeded its peak for ``stable_after`` steps and is not below
    ``share`` of the peak, which excludes warm-up and the end of a decay.

    Args:
        stable_after: optimizer steps without a new peak.
        share: smallest share of the peak, in [0, 1].

    >>> trend = LearningRateTrend(stable_after=2)
    >>> for rate in (0.1, 0.2, 0.2, 0.2, 0.05):
    ...     trend.update(StepStats(step=0, loss=1.0, grad_norm=1.0, learning_rates=(rate,)))
    ...     print(rate, trend.stable)
    0.1 False
    0.2 False
    0.2 False
    0.2 True
    0.05 False
    """

    def __init__(self, *, stable_after: int = 50, share: float = 0.5) -> None:
        require(stable_after >= 1, "stable_after", stable_after, "at least 1")
        require(0 <= share <= 1, "share", share, "in [0, 1]")
        self.stable_after, self.share = stable_after, share
        self.rate = 0.0
        """The last learning rate."""
        self._peak = 0.0
        self._since_rise = 0

    @property
    def stable(self) -> bool:
        """Whether the rate is stable; without known rates True after ``stable_after`` steps."""
        return self._since_rise >= self.stable_after and self.rate >= self.share * self._peak

    def update(self, stats: StepStats) -> None:
        """Adds the learning rate of a step."""
        self.rate = max(stats.nominal_learning_rates or stats.learning_rates, default=0.0)
        self._since_rise = 0 if self.rate > self._peak else self._since_rise + 1
        self._peak = max(self._peak, self.rate)

    def state_dict(self) -> dict[str, Any]:
        """Returns rate, peak, and steps since the last new peak."""
        return {"rate": self.rate, "peak": self._peak, "since_rise": self._since_rise}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.rate, self._peak = float(state["rate"]), float(state["peak"])
        self._since_rise = int(state["since_rise"])


class Plateau:
    """Counts the blocks of losses since the block median was last lower than the lowest so far.

    A median is lower if it is below the lowest by ``fall`` of the lowest's absolute value. The
    lowest changes only then, so a slow fall adds up.

    Args:
        block: losses per median.
        fall: smallest fall that counts, as a share of the lowest's absolute value.

    >>> plateau = Plateau(block=1, fall=0.1)
    >>> for loss in (10.0, 9.5, 9.2, 8.9, 8.9):
    ...     plateau.update(loss)
    ...     print(loss, plateau.lowest, plateau.stale)
    10.0 10.0 0
    9.5 10.0 1
    9.2 10.0 2
    8.9 8.9 0
    8.9 8.9 1
    """

    def __init__(self, *, block: int, fall: float = 0.01) -> None:
        require(block >= 1, "block", block, "at least 1")
        require(0 <= fall < 1, "fall", fall, "in [0, 1)")
        self.block, self.fall = block, fall
        self.lowest = math.inf
        self.stale = 0
        """Blocks since the last one that was lower."""
        self._losses: list[float] = []

    def update(self, loss: float) -> None:
        """Adds a loss; a non-finite one is ignored."""
        if not math.isfinite(loss):
            return
        self._losses.append(loss)
        if len(self._losses) < self.block:
            return
        block_median, self._losses = median(self._losses), []
        if self.lowest == math.inf or block_median < self.lowest - self.fall * abs(self.lowest):
            self.lowest, self.stale = block_median, 0
        else:
            self.stale += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state as plain values."""
        return {"lowest": self.lowest, "stale": self.stale, "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.lowest, self.stale = float(state["lowest"]), int(state["stale"])
        self._losses = [float(x) for x in state["losses"]]


class LossTrend:
    """Compares medians of blocks of losses with the first losses and with the lowest median.

    A median is lower than another if it is below it by the larger of two margins: ``fall`` of the
    first loss's absolute value, and four standard errors of the difference of two medians
    (1.2533 sigma / sqrt(n) each). Sigma comes from successive differences, which a trend does not
    widen. The lowest median changes only with a lower one, so a slow fall adds up.

    Args:
        block: losses per median.
        fall: smallest fall that counts, as a share of the first loss's absolute value.

    >>> trend = LossTrend(block=2)
    >>> for loss in (4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.5, 3.5):
    ...     trend.update(loss)
    >>> trend.first, trend.lowest, trend.recent, trend.stale, trend.learnt
    (4.0, 3.0, 3.5, 2, True)
    """

    def __init__(self, *, block: int = 50, fall: float = 0.01) -> None:
        require(block >= 2, "block", block, "at least 2")
        require(fall >= 0, "fall", fall, "at least 0")
        self.block, self.fall = block, fall
        self.first = math.nan
        """Median of the first five losses."""
        self.lowest = math.nan
        """Lowest median that counted as a fall."""
        self.recent = math.nan
        """Median of the last block; NaN before the first block is complete."""
        self.stale = 0
        """Blocks since the last one that was lower."""
        self.learnt = False
        """Whether the loss has ever fallen below its first values."""
        self._margin = 0.0
        self._losses: list[float] = []

    @property
    def above_lowest(self) -> bool:
        """Whether the last median is above the lowest by more than noise."""
        return self.recent > self.lowest + self._margin

    def update(self, loss: float) -> None:
        """Adds a loss; a non-finite one is ignored."""
        if not math.isfinite(loss):
            return
        self._losses.append(loss)
        if math.isnan(self.first) and len(self._losses) == min(5, self.block):
            self.first = median(self._losses)
        if len(self._losses) == self.block:
            self._close()
            self._losses = []

    def _close(self) -> None:
        self.recent = median(self._losses)
        steps = [abs(b - a) for a, b in pairwise(self._losses)]
        sigma = 1.4826 * median(steps) / math.sqrt(2)
        few = min(5, self.block)
        self._margin = self._margin_of(sigma, self.block)
        if math.isnan(self.lowest):
            # The first median is of fewer losses and therefore less certain.
            self.learnt = self.recent < self.first - self._margin_of(sigma, few)
            self.lowest = self.recent
            return
        if self.recent < self.lowest - self._margin:
            self.lowest, self.stale, self.learnt = self.recent, 0, True
        else:
            self.stale += 1

    def _margin_of(self, sigma: float, count: int) -> float:
        error = 1.2533 * sigma * math.sqrt(1 / count + 1 / self.block)
        return max(self.fall * abs(self.first), 4 * error)

    def state_dict(self) -> dict[str, Any]:
        """Returns the whole state as plain values."""
        return {
            "first": self.first,
            "lowest": self.lowest,
            "recent": self.recent,
            "stale": self.stale,
            "learnt": self.learnt,
            "margin": self._margin,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.first, self.lowest = float(state["first"]), float(state["lowest"])
        self.recent, self.stale = float(state["recent"]), int(state["stale"])
        self.learnt, self._margin = bool(state["learnt"]), float(state["margin"])
        self._losses = [float(x) for x in state["losses"]]
