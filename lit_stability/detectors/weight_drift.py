"""Weights that grow and grow while the loss gains nothing by it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.trends import LossTrend
from lit_stability.measurement.step_stats import StepStats


class WeightDrift:
    """Objects, once an episode, to a weight norm that multiplies while the loss stands.

    Looked at is the norm of all weights on the steps that scan them. An episode is a norm that is
    ``factor`` times what it was ``window`` scans before, and rose at nine in ten of those between,
    while the loss has not fallen for two blocks. Weights also grow in health, from a small start or
    where nothing decays them: then the loss falls, or the growth takes thousands of steps. It ends
    when the norm is back below ``factor``. Too high a learning rate is what drives it as a rule.
    It is not in the default set: a net that has to grow towards targets of 2000, and learns them
    slowly, is told of as well.

    ``layers`` names the parameters that have grown most since the first scan, each with its factor.

    Args:
        factor: growth that counts.
        window: scans that it may take, ten optimizer steps each by default.
        block: losses per median; see `LossTrend`.

    Raises:
        ValueError: if an argument is out of its range.

    >>> d = WeightDrift(window=4, block=2)
    >>> for i, norm in enumerate([10.0, 10.0, 10.0, 10.0, 14.0, 20.0, 28.0, 40.0, 50.0]):
    ...     stats = StepStats(step=i, loss=2.8, grad_norm=1.0, weight_norm=norm)
    ...     if anomaly := d.check(stats):
    ...         print(i, anomaly.message)
    ...     d.update(stats)
    7 the norm of all weights went from 10 to 40 in 4 scans and the loss stands at 2.8
    """

    shared_by_ranks = "yes"

    def __init__(self, *, factor: float = 3.0, window: int = 20, block: int = 50) -> None:
        require(factor > 1, "factor", factor, "greater than 1")
        require(window >= 2, "window", window, "at least 2")
        self.factor, self.window = factor, window
        self._trend = LossTrend(block=block)
        self._norms: deque[float] = deque(maxlen=window)
        self._first: dict[str, float] = {}
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        norm = stats.weight_norm
        if norm is None or self._told or not self._has_grown(norm) or self._trend.stale < 2:
            return None
        before = self._norms[0]
        return Anomaly(
            kind="weight drift",
            step=stats.step,
            value=norm,
            signal="weight_norm",
            baseline=before,
            threshold=self.factor * before,
            optimizer=stats.optimizer,
            warn_only=True,
            layers=tuple(self._grown_most(stats)),
            message=f"the norm of all weights went from {before:.4g} to {norm:.4g} in "
            f"{self.window} scans and the loss stands at {self._trend.recent:.4g}",
        )

    def _has_grown(self, norm: float) -> bool:
        if len(self._norms) < self.window or not math.isfinite(norm):
            return False
        if not norm > self.factor * self._norms[0] > 0:
            return False
        path = [*self._norms, norm]
        rises = sum(b > a for a, b in pairwise(path))
        return rises >= 0.9 * self.window

    def _grown_most(self, stats: StepStats) -> list[tuple[str, float]]:
        grown = [(n, v / self._first[n]) for n, v in stats.weight_norms if self._first.get(n)]
        return sorted(grown, key=lambda pair: -pair[1])[:5]

    def update(self, stats: StepStats) -> None:
        """Learn an accepted step; what was objected to is told of once."""
        norm = stats.weight_norm
        if norm is not None and math.isfinite(norm):
            self._told = (self._told and self._has_grown(norm)) or self.check(stats) is not None
            self._first = self._first or dict(stats.weight_norms)
            self._norms.append(norm)
        self._trend.update(stats.loss)

    def state_dict(self) -> dict[str, Any]:
        """The norms of late and of the first scan, the course, and whether it was told."""
        return {
            "norms": list(self._norms),
            "first": dict(self._first),
            "course": self._trend.state_dict(),
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._norms = deque(map(float, state["norms"]), maxlen=self.window)
        self._first, self._told = dict(state["first"]), bool(state["told"])
        self._trend.load_state_dict(state["course"])
