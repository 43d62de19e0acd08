"""A gradient that has vanished, told from a warm-up, a decay and a run that has converged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rolling_window import Window
from lit_stability.detectors.trends import LearningRateTrend, LossTrend
from lit_stability.measurement.step_stats import StepStats


class Vanishing:
    """Objects, once an episode, to a gradient norm that stays tiny while the loss stands.

    A norm is tiny when it is below ``bound`` and, where the run has known others, below ``ratio``
    times their median; tiny norms are not learnt. A tiny norm is no trouble by itself. It is told
    of when

    * there have been ``persist`` in a row, after ``min_step``,
    * the learning rate has settled: it has not risen of late, and is not below half its peak,
    * the loss does not fall any more, by the medians of blocks of ``block``, and
    * the run has not simply converged.

    A converged run has a tiny norm too, after a long descent even one that fell by as much: what
    tells the two apart is where the loss stands. At the lowest it has been, after having fallen
    from its first values, there is nothing better known to lose, and nothing is said. Above its
    lowest, or never below its first, the gradient is gone and the minimum is not there.

    Args:
        bound: of the norm of all gradients, absolute.
        ratio: of the median of the norms that were not tiny.
        persist: tiny norms in a row.
        min_step: optimizer steps before anything is said.
        block: losses per median; see `LossTrend`.
        window: norms remembered.
        min_history: norms before ``ratio`` counts.

    Raises:
        ValueError: if an argument is out of its range.

    >>> d = Vanishing(persist=3, min_step=0, block=2)
    >>> norms, losses = [1.0] * 60 + [1e-9] * 9, [2.0] * 60 + [7.0] * 9
    >>> for i, (norm, loss) in enumerate(zip(norms, losses)):
    ...     stats = StepStats(step=i, loss=loss, grad_norm=norm, learning_rates=(0.1,))
    ...     if anomaly := d.check(stats):
    ...         print(i, anomaly.message)
    ...     d.update(stats)
    62 gradient norm 1e-09 for 3 steps, before that 1, and the loss stands at 7
    """

    def __init__(
        self,
        *,
        bound: float = 1e-6,
        ratio: float = 1e-3,
        persist: int = 50,
        min_step: int = 100,
        block: int = 50,
        window: int = 100,
        min_history: int = 20,
    ) -> None:
        require(bound > 0, "bound", bound, "greater than 0")
        require(0 < ratio < 1, "ratio", ratio, "in (0, 1)")
        require(persist >= 1, "persist", persist, "at least 1")
        require(min_step >= 0, "min_step", min_step, "at least 0")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        self.bound, self.ratio, self.persist, self.min_step = bound, ratio, persist, min_step
        self.min_history = min_history
        self.window = Window(window)
        self._rate, self._trend = LearningRateTrend(), LossTrend(block=block)
        self._tiny_for = 0
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        tiny_for = self._tiny_for + self._is_tiny(stats.grad_norm)
        if tiny_for <= self._tiny_for or tiny_for < self.persist:
            return None
        if self._told or stats.step < self.min_step or not self._rate.stable:
            return None
        if not self._is_stuck(stats):
            return None
        known = len(self.window) >= self.min_history
        before = f", before that {math.exp(self.window.median):.3g}," if known else ""
        return Anomaly(
            kind="vanishing gradient",
            step=stats.step,
            value=stats.grad_norm,
            signal="grad_norm",
            baseline=math.exp(self.window.median) if known else None,
            threshold=self._threshold(),
            optimizer=stats.optimizer,
            warn_only=True,
            layers=tuple(stats.worst_layers()),
            message=f"gradient norm {stats.grad_norm:.3g} for {tiny_for} steps{before} and the "
            f"loss stands at {stats.loss:.4g}",
        )

    def _is_stuck(self, stats: StepStats) -> bool:
        """Whether the loss neither falls nor stands where it has been lowest."""
        trend = self._trend
        if not stats.has_loss or math.isnan(trend.recent):
            return False
        return trend.stale >= 1 and (trend.above_lowest or not trend.learnt)

    def _threshold(self) -> float:
        if len(self.window) < self.min_history:
            return self.bound
        return min(self.bound, self.ratio * math.exp(self.window.median))

    def _is_tiny(self, norm: float) -> bool:
        return norm < self.bound and norm < self._threshold()

    def update(self, stats: StepStats) -> None:
        """Learn an accepted step; what was objected to is told of once."""
        self._told = self._told or self.check(stats) is not None
        self._rate.update(stats)
        self._trend.update(stats.loss)
        if self._is_tiny(stats.grad_norm):
            self._tiny_for += 1
        elif math.isfinite(stats.grad_norm):
            self._tiny_for, self._told = 0, False
            self.window.add(math.log(stats.grad_norm))

    def state_dict(self) -> dict[str, Any]:
        """The window, the courses of rate and loss, and what was told."""
        return {
            "window": list(self.window.values),
            "rate": self._rate.state_dict(),
            "course": self._trend.state_dict(),
            "tiny_for": self._tiny_for,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.window.replace(state["window"])
        self._rate.load_state_dict(state["rate"])
        self._trend.load_state_dict(state["course"])
        self._tiny_for, self._told = int(state["tiny_for"]), bool(state["told"])
