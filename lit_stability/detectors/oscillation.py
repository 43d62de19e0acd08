"""A loss that swings wider and wider."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rolling_window import Window
from lit_stability.measurement.step_stats import StepStats


class Oscillation:
    """Objects, once an episode, to a loss that goes up and down by more each time.

    An episode is a run of at least ``swings`` changes of the loss, each against the one before and
    larger than the last in its own direction, of which the last is ``growth`` times the first. The
    last must also be above ``sigmas`` robust standard deviations of the changes of late, and above
    ``rise`` of the loss's median: with noise some zigzag is always growing, and at the edge of
    stability (Cohen et al. 2021, arXiv 2103.00065) full-batch descent swings within what it can
    bear. Changes that widen are not learnt.

    The step is good as it is; what comes of it is left to the detectors of divergence.

    Args:
        swings: changes in a row.
        growth: factor from the first of them to the last.
        sigmas: robust standard deviations of the changes of late.
        rise: of the median loss's absolute value.
        window: losses and changes remembered.
        min_history: changes before ``sigmas`` counts.

    Raises:
        ValueError: if an argument is out of its range.

    >>> losses = [2.0, 1.8, 2.2, 1.6, 2.5, 1.4, 3.2, 1.2, 5.8, float("nan")]
    >>> d = Oscillation()
    >>> for i, loss in enumerate(losses):
    ...     stats = StepStats(step=i, loss=loss, grad_norm=1.0)
    ...     if anomaly := d.check(stats):
    ...         print(i, anomaly.message)
    ...     d.update(stats)
    7 the loss swings wider each time: 7 swings, from 0.2 to 2
    """

    shared_by_ranks = "yes"

    def __init__(
        self,
        *,
        swings: int = 7,
        growth: float = 8.0,
        sigmas: float = 8.0,
        rise: float = 0.5,
        window: int = 100,
        min_history: int = 20,
    ) -> None:
        require(swings >= 3, "swings", swings, "at least 3")
        require(growth > 1, "growth", growth, "greater than 1")
        require(sigmas > 0, "sigmas", sigmas, "greater than 0")
        require(rise >= 0, "rise", rise, "at least 0")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        self.swings, self.growth, self.sigmas, self.rise = swings, growth, sigmas, rise
        self.min_history = min_history
        self.losses, self.changes = Window(window), Window(window)
        self._last = math.nan
        self._first = 0.0
        """First change of the run that alternates and grows."""
        self._change = 0.0
        self._before = 0.0
        """The change before that: the last one in the other direction."""
        self._swings = 0
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        if self._told or self._swings + 1 < self.swings or not self._widens(stats.loss):
            return None
        first, now = abs(self._first), abs(stats.loss - self._last)
        if now < self.growth * first or now <= self._used_to():
            return None
        count = self._swings + 1
        return Anomaly(
            kind="oscillation",
            step=stats.step,
            value=now,
            signal="loss",
            baseline=first,
            threshold=max(self.growth * first, self._used_to()),
            optimizer=stats.optimizer,
            warn_only=True,
            layers=tuple(stats.worst_layers()),
            message=f"the loss swings wider each time: {count} swings, from {first:.3g} to "
            f"{now:.3g}",
        )

    def _widens(self, loss: float) -> bool:
        change = loss - self._last
        return change * self._change < 0 and abs(change) > abs(self._before)

    def _used_to(self) -> float:
        """The largest change that is nothing to speak of."""
        large = self.rise * abs(self.losses.median)
        if len(self.changes) < self.min_history:
            return large
        # Changes have no mean to speak of: their size is their deviation.
        return max(large, self.sigmas * 1.4826 * self.changes.median)

    def update(self, stats: StepStats) -> None:
        """Learn an accepted step; what was objected to is told of once."""
        if not math.isfinite(stats.loss):
            return
        self._told = self._told or self.check(stats) is not None
        self.losses.add(stats.loss)
        if self._widens(stats.loss):
            self._before, self._change = self._change, stats.loss - self._last
            self._swings += 1
        else:
            self._begin_run(stats.loss - self._last)
        self._last = stats.loss

    def _begin_run(self, change: float) -> None:
        """Begin with a change that is no wider, as most are: these are what a run is used to."""
        self._told = False
        change = change if math.isfinite(change) else 0.0
        self._first, self._change, self._before, self._swings = change, change, 0.0, 1
        if change:
            self.changes.add(abs(change))

    def state_dict(self) -> dict[str, Any]:
        """The windows, the run of changes, and whether it was told."""
        return {
            "losses": list(self.losses.values),
            "changes": list(self.changes.values),
            "last": self._last,
            "first": self._first,
            "change": self._change,
            "before": self._before,
            "swings": self._swings,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.losses.replace(state["losses"])
        self.changes.replace(state["changes"])
        self._last, self._first = float(state["last"]), float(state["first"])
        self._change, self._before = float(state["change"]), float(state["before"])
        self._swings = int(state["swings"])
        self._told = bool(state["told"])
