"""Trends of loss, gradient norm, update and learning rate, relative to their baselines.

All are logarithms, ratios or robust standard deviations, so they are comparable between models.
Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lit_stability.detectors import Window
from lit_stability.measurement.step_stats import StepStats

_RECENT = 12
"""Accepted steps of a trend, three blocks of four; the baseline is from before them."""
_BASELINE = 100
"""Accepted steps of the baseline."""
_MIN_BASELINE = 8
_LEAST_SPREAD = 0.02
"""Smallest standard deviation of a logarithm: a constant quantity is assumed to vary by 2 %."""
_BEST_OF = 10
"""Number of losses whose median is a level that the run has reached."""

FEATURES = ("loss peak", "loss margin", "gradient trend", "update trend", "learning rate")
"""Features of the risk, in order; 0, or -3 for the margin, is no sign of a divergence."""


class Signal:
    """The logarithms of one quantity: the recent ones, and the baseline before them.

    One value cannot make a trend: a block of four steps is represented by its median, and the peak
    is the second largest of six values.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=_RECENT)
        self.baseline = Window(_BASELINE)
        self.changes = Window(_BASELINE)
        """Absolute changes from step to step within the baseline."""

    def add(self, value: float | None) -> None:
        """Adds a value; a value without a logarithm is ignored."""
        if value is None or not 0 < value < math.inf:
            return
        if len(self.recent) == _RECENT:
            self.baseline.add(self.recent[0])
            self.changes.add(abs(self.recent[1] - self.recent[0]))
        self.recent.append(math.log(value))

    @property
    def known(self) -> bool:
        """Whether there is a baseline to compare with."""
        return len(self.baseline) >= _MIN_BASELINE

    @property
    def peak(self) -> float:
        """Second largest of the last six values."""
        return sorted(list(self.recent)[-6:])[-2]

    @property
    def excess(self) -> float:
        """Difference of the last value and the median of the baseline."""
        return self.recent[-1] - self.baseline.median

    @property
    def rise(self) -> float:
        """Difference of the newest and the oldest of the three blocks."""
        values = list(self.recent)
        return median(values[-4:]) - median(values[:4])

    def deviations(self, difference: float) -> float:
        """Returns asinh of a difference in standard deviations of the baseline."""
        return math.asinh(difference / max(self.baseline.sigma, _LEAST_SPREAD))

    def state_dict(self) -> dict[str, list[float]]:
        """Returns all values."""
        return {
            "recent": list(self.recent),
            "baseline": list(self.baseline.values),
            "changes": list(self.changes.values),
        }

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restores what `state_dict` returned."""
        self.recent = deque(state["recent"], maxlen=_RECENT)
        self.baseline.replace(state["baseline"])
        self.changes.replace(state["changes"])


class Trends:
    """Trends of the accepted steps of one optimizer.

    Features, in the order of `FEATURES`:

    * *loss peak*: the second largest of six losses relative to the median of the baseline, in its
      robust standard deviations. Detects a steady rise and growing oscillation.
    * *loss margin*: logarithm of the same loss over the bound of a divergence, in [-3, 1]. The
      bound is three times the best level, or half the way back to the loss at the start of the run
      if that is higher.
    * *gradient trend*: rise of the norm within 12 steps over the usual change from step to step.
    * *update trend*: logarithm of the rise of update-to-weight ratio per learning rate within 12
      steps, if it rises: the first sign of updates that amplify themselves.
    * *learning rate*: logarithm of the learning rate over that of the baseline, if it is higher.

    A loss of 0 or less has no logarithm: nothing is known until 20 consecutive losses are above 0.
    """

    def __init__(self) -> None:
        self._signals = {name: Signal() for name in ("loss", "gradient", "update", "rate")}
        self._begin: list[float] = []
        """The first ten losses."""
        self._best = math.inf

    @property
    def known(self) -> bool:
        """Whether the loss has a baseline."""
        return self._signals["loss"].known

    def update(self, stats: StepStats) -> None:
        """Adds an accepted step; non-finite values are ignored."""
        s = self._signals
        s["rate"].add(max(stats.learning_rates, default=0.0))
        s["gradient"].add(stats.grad_norm)
        if stats.update_ratio and stats.update_learning_rate > 0:
            s["update"].add(stats.update_ratio / stats.update_learning_rate)
        if stats.has_loss and stats.loss <= 0:
            s["loss"] = Signal()
        elif stats.has_loss and math.isfinite(stats.loss):
            self._learn_loss(stats.loss)

    def _learn_loss(self, loss: float) -> None:
        signal = self._signals["loss"]
        signal.add(loss)
        if len(self._begin) < _BEST_OF:
            self._begin.append(loss)
        if len(signal.recent) >= _BEST_OF:
            level = math.exp(median(list(signal.recent)[-_BEST_OF:]))
            self._best = min(self._best, level)

    @property
    def bound(self) -> float:
        """Loss above which the run has diverged, if the loss stays there."""
        return max(3 * self._best, (self._best + median(self._begin)) / 2)

    def features(self) -> tuple[float, ...]:
        """Returns the features that the class describes; requires `known`."""
        loss, gradient, update, rate = self._signals.values()
        margin = loss.peak - math.log(self.bound)
        usual = max(1.05 * gradient.changes.median, _LEAST_SPREAD) if gradient.known else 1.0
        return (
            _within(-3, loss.deviations(loss.peak - loss.baseline.median), 5),
            _within(-3, margin, 1),
            _within(-3, math.asinh(gradient.rise / usual), 5) if gradient.known else 0.0,
            _within(0, update.rise, 5) if update.known else 0.0,
            _within(0, rate.excess, 5) if rate.known else 0.0,
        )

    def in_words(self) -> tuple[str, ...]:
        """Returns a description of each feature, in the same order."""
        loss, gradient, update, rate = self._signals.values()
        return (
            f"loss {math.exp(loss.peak - loss.baseline.median):.3g} times its usual",
            f"loss {math.exp(loss.peak) / self.bound:.2g} of what counts as diverged",
            f"gradient norm x{math.exp(gradient.rise) if gradient.known else 1:.3g} in 12 steps",
            f"update per learning rate x{math.exp(update.rise) if update.known else 1:.3g}",
            f"learning rate {math.exp(rate.excess) if rate.known else 1:.3g} times its usual",
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns signals and levels as plain values."""
        signals = {name: signal.state_dict() for name, signal in self._signals.items()}
        return {"signals": signals, "begin": list(self._begin), "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, signal in self._signals.items():
            signal.load_state_dict(state["signals"][name])
        self._begin, self._best = list(state["begin"]), float(state["best"])


def _within(low: float, value: float, high: float) -> float:
    return max(low, min(value, high))
