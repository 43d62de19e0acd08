"""Weights that changed by more than their updates explain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.stats import StepStats


class WeightCorruption:
    """Objects to a weight whose norm changed by more than all updates since the last scan explain.

    A norm cannot change by more than the distance its tensor has moved (triangle inequality), so a
    larger change was made outside the optimizer: memory, a stray write, a flipped bit. The distance
    is known from a sample, without its largest element; as a sample may miss the few rows of an
    embedding that moved, the change must also be beyond all that this weight has done. A weight is
    corrupt when its change is at once

    * above ``slack`` times the sampled distance,
    * above ``ratio`` times the largest it has made, per unit of learning rate, of late, and
    * above ``floor`` of its norm.

    What comes back when the same steps are taken again is no corruption but the run's own code:
    it is accepted, and ``regimes`` counts it. A weight whose first change is seen passes.

    Args:
        slack: factor on the sampled distance, at least 1.
        ratio: factor on the largest change of late, at least 1.
        floor: smallest relative change that counts; fp32 norms are right to about 1e-5.
        min_history: changes of a weight before the first verdict on it.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.stats import WeightMoves
    >>> detector = WeightCorruption(min_history=2)
    >>> norms = [1.0, 1.01, 1.02, 1.03, 1.9]
    >>> for i, (before, now) in enumerate(zip(norms, norms[1:])):
    ...     moves = WeightMoves(since=10 * i, norms=(before,), distances=(0.02,))
    ...     stats = StepStats(step=10 * i + 10, loss=1.0, grad_norm=1.0, weight_moves=moves,
    ...                       weight_norms=(("w", now),), update_learning_rate=0.1)
    ...     if anomaly := detector.check(stats):
    ...         print(anomaly.step, anomaly.layers)
    ...     detector.update(stats)
    40 (('w', 1.9),)
    """

    shared_by_ranks = "yes"

    def __init__(
        self,
        *,
        slack: float = 3.0,
        ratio: float = 10.0,
        floor: float = 1e-3,
        min_history: int = 3,
    ) -> None:
        require(slack >= 1, "slack", slack, "at least 1")
        require(ratio >= 1, "ratio", ratio, "at least 1")
        require(floor > 0, "floor", floor, "greater than 0")
        require(min_history >= 1, "min_history", min_history, "at least 1")
        self.slack, self.ratio, self.floor = slack, ratio, floor
        self.min_history = min_history
        self.regimes = 0
        self._reach: dict[str, float] = {}
        """Largest change of each weight per unit of learning rate, decayed."""
        self._changes: dict[str, int] = {}
        self._rates = 0.0
        """Sum of the learning rates since the last scan."""
        self._told: dict[str, int] = {}

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        moves = stats.weight_moves
        if moves is None:
            return None
        rates = self._rates + stats.update_learning_rate
        found: list[tuple[float, str, float, float]] = []
        rows = zip(stats.weight_norms, moves.norms, moves.distances, strict=True)
        for (name, norm), before, distance in rows:
            change = abs(norm - before)
            if change <= self.slack * distance or change <= self.floor * before:
                continue
            if not math.isfinite(change) or self._changes.get(name, 0) < self.min_history:
                continue
            reach = self._reach[name] * rates
            if change > self.ratio * reach:
                found.append((change / (before or change), name, norm, before))
        found = [row for row in found if not self._has_returned(row[1], moves.since)]
        return self._anomaly(stats, moves.since, sorted(found, reverse=True)) if found else None

    def _has_returned(self, name: str, since: int) -> bool:
        if since >= self._told.get(name, -1):
            return False
        del self._told[name]
        self.regimes += 1
        return True

    def _anomaly(
        self, stats: StepStats, since: int, found: list[tuple[float, str, float, float]]
    ) -> Anomaly:
        self._told |= {name: stats.step for _, name, _, _ in found}
        change, name, norm, before = found[0]
        return Anomaly(
            kind="weight corruption",
            step=stats.step,
            value=norm,
            signal="weight_norm",
            baseline=before,
            threshold=before * (1 + self.floor),
            optimizer=stats.optimizer,
            state_is_bad=True,
            since=since,
            layers=tuple((n, v) for _, n, v, _ in found[:5]),
            message=f"the norm of {name} went from {before:.4g} to {norm:.4g} ({change:.2g} of it) "
            f"since step {since}, which no update explains",
        )

    def update(self, stats: StepStats) -> None:
        """Learn what the weights have done."""
        self._rates += stats.update_learning_rate
        if not stats.weight_norms:
            return
        rates, self._rates = self._rates, 0.0
        moves = stats.weight_moves
        if moves is None or rates <= 0:
            return
        for (name, norm), before in zip(stats.weight_norms, moves.norms, strict=True):
            change = abs(norm - before) / rates
            if math.isfinite(change):
                self._reach[name] = max(change, 0.9 * self._reach.get(name, 0.0))
                self._changes[name] = self._changes.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """What each weight has done; not what was told, so that no restore can undo it."""
        return {
            "reach": dict(self._reach),
            "changes": dict(self._changes),
            "rates": self._rates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self._reach, self._changes = dict(state["reach"]), dict(state["changes"])
        self._rates = float(state["rates"])
