"""A loss that rose and does not come back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rejection_streak import Row
from lit_stability.detectors.rolling_window import Window
from lit_stability.measurement.step_stats import StepStats


class Divergence:
    """Objects to a loss that stays far above the window for ``persist`` steps in a row.

    A step is high when its loss is above the median by ``sigmas`` robust standard deviations and
    by ``rise`` of the median's size. High losses are not learnt. One hard batch, or nine, pass
    unmentioned. Raised ``give_up`` times without a step in between that is not high, the height
    is a new regime: the window is emptied, ``regimes`` counts it, and learning starts anew. So it
    is where a rollback lies between, if it is raised again at the very same step although the
    learning rate was lowered: a loss that the weights have driven up would come at another.

    Args:
        rise: smallest rise that counts, as a share of the median's absolute value.
        sigmas: smallest rise that counts, in robust standard deviations.
        persist: high steps in a row before it is said.
        window: accepted values remembered.
        min_history: accepted values before the first verdict.
        give_up: times it is said before the window is emptied.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> from lit_stability.detectors import flagged
    >>> d = Divergence(persist=3, min_history=4)
    >>> losses = [2.0, 1.9, 2.0, 1.9, 9.0, 1.9, 5.0, 6.0, 8.0]
    >>> [i for i, x in enumerate(losses) if flagged(d, StepStats(step=i, loss=x, grad_norm=1.0))]
    [8]
    """

    shared_by_ranks = "yes"

    def __init__(
        self,
        *,
        rise: float = 0.5,
        sigmas: float = 8.0,
        persist: int = 10,
        window: int = 200,
        min_history: int = 20,
        give_up: int = 2,
    ) -> None:
        require(rise > 0, "rise", rise, "greater than 0")
        require(sigmas > 0, "sigmas", sigmas, "greater than 0")
        require(persist >= 1, "persist", persist, "at least 1")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        require(give_up >= 1, "give_up", give_up, "at least 1")
        self.rise, self.sigmas, self.persist = rise, sigmas, persist
        self.min_history, self.give_up = min_history, give_up
        self.window = Window(window)
        self.high = 0
        self._row = Row()
        self._rate = 0.0
        """Learning rate when it was raised last."""
        self.regimes = 0

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        if not self._is_high(stats.loss):
            return None
        self.high += 1
        if self.high < self.persist:
            return None
        self.high = 0
        rate, before = max(stats.learning_rates, default=0.0), self._rate
        self._rate = rate
        if self._row.refused(stats.step, changed=rate < before) > self.give_up:
            self.reset_windows()
            self.regimes += 1
            return None
        median = self.window.median
        return Anomaly(
            kind="divergence",
            step=stats.step,
            value=stats.loss,
            signal="loss",
            baseline=median,
            threshold=self._threshold(),
            optimizer=stats.optimizer,
            state_corrupted=True,
            since=max(0, stats.step - self.persist),
            layers=tuple(stats.worst_layers()),
            message=f"loss {stats.loss:.4g} has stayed above {self._threshold():.4g} for "
            f"{self.persist} steps; its median was {median:.4g}",
        )

    def update(self, stats: StepStats) -> None:
        """Learn an accepted loss, unless it is high."""
        if self._is_high(stats.loss):
            return
        self.high = 0
        self._row.accepted(stats.step)
        self.window.add(stats.loss)

    def reset_windows(self) -> None:
        """Forget what was normal, here or for another detector of the run."""
        self.window.replace([])
        self._row, self.high = Row(), 0

    def _threshold(self) -> float:
        median = self.window.median
        return median + max(self.rise * abs(median), self.sigmas * self.window.sigma)

    def _is_high(self, loss: float) -> bool:
        if len(self.window) < self.min_history or not math.isfinite(loss):
            return False
        median = self.window.median
        # The cheap bound first: the other one needs the window's spread.
        return loss > median + self.rise * abs(median) and loss > self._threshold()

    def state_dict(self) -> dict[str, Any]:
        """The window; the counts are not part of it, so no restore can undo a give-up."""
        return {"window": list(self.window.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a window back."""
        self.window.replace(state["window"])
