"""Detects a vanished gradient, as opposed to a warm-up, a decay or a converged run."""

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rolling_window import Window
from lit_stability.detectors.trends import ROUNDING, LearningRateTrend, LossTrend
from lit_stability.measurement.step_stats import StepStats


class Vanishing:
    """Warns, once per episode, of a gradient norm that stays tiny while the loss does not fall.

    A norm is tiny if it is below ``bound`` and, once enough norms are known, below ``ratio`` times
    their median. Tiny norms are not learnt. They are reported only if

    * there have been ``persist`` in a row, after ``min_step``,
    * the learning rate is stable: it has not risen recently and is not below half its peak,
    * the loss no longer falls, by the medians of blocks of ``block``, and
    * the run has not simply converged, and its loss is not 0.

    A converged run has tiny norms too, after a long descent; the level of the loss distinguishes
    the two. A loss that has fallen from its first values and is now at its lowest has converged. A
    loss above its lowest value, or one that never fell, is not at a minimum: the gradient has
    vanished.

    Args:
        bound: absolute bound on the norm of all gradients.
        ratio: bound relative to the median of the norms that were not tiny.
        persist: consecutive tiny norms.
        min_step: optimizer steps before the first warning.
        block: losses per median; see `LossTrend`.
        window: number of norms in the window.
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
    62 gradient norm 1e-09 for 3 steps, before that 1, and the loss stays at 7
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
        self._rate_trend, self._loss_trend = LearningRateTrend(), LossTrend(block=block)
        self._tiny_for = 0
        self._reported = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if the gradient has vanished."""
        tiny_for = self._tiny_for + self._is_tiny(stats.grad_norm)
        if tiny_for <= self._tiny_for or tiny_for < self.persist:
            return None
        if self._reported or stats.step < self.min_step or not self._rate_trend.stable:
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
            f"loss stays at {stats.loss:.4g}",
        )

    def _is_stuck(self, stats: StepStats) -> bool:
        """Whether the loss neither falls nor is at its lowest level."""
        trend = self._loss_trend
        if not stats.has_loss or math.isnan(trend.recent) or abs(trend.recent) <= ROUNDING:
            return False
        return trend.stale >= 1 and (trend.above_lowest or not trend.learnt)

    def _threshold(self) -> float:
        if len(self.window) < self.min_history:
            return self.bound
        return min(self.bound, self.ratio * math.exp(self.window.median))

    def _is_tiny(self, norm: float) -> bool:
        return norm < self.bound and norm < self._threshold()

    def update(self, stats: StepStats) -> None:
        """Learns from an accepted step."""
        self._reported = self._reported or self.check(stats) is not None
        self._rate_trend.update(stats)
        self._loss_trend.update(stats.loss)
        if self._is_tiny(stats.grad_norm):
            self._tiny_for += 1
        elif math.isfinite(stats.grad_norm):
            self._tiny_for, self._reported = 0, False
            self.window.add(math.log(stats.grad_norm))

    def state_dict(self) -> dict[str, Any]:
        """Returns the window, the trends of rate and loss, and whether a warning was given."""
        return {
            "window": list(self.window.values),
            "rate": self._rate_trend.state_dict(),
            "course": self._loss_trend.state_dict(),
            "tiny_for": self._tiny_for,
            "told": self._reported,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.window.replace(state["window"])
        self._rate_trend.load_state_dict(state["rate"])
        self._loss_trend.load_state_dict(state["course"])
        self._tiny_for, self._reported = int(state["tiny_for"]), bool(state["told"])
