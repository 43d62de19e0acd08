"""A learning rate beyond what the curvature along the gradient bears.

Judges what a `CurvatureProbe` has read; without one it is silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.measurement.step_stats import StepStats


class Curvature:
    """Tells, once, when the curvature ratio stays above ``bound`` for ``persist`` readings.

    Above 1 an update overshoots along the gradient by more than it gains: the loss rises, and
    where that lasts it spikes (arXiv 2506.04805: a spike sets in when the curvature along the
    gradient stays beyond 2 / learning rate, as Adam's second moment does not follow). One or three
    readings above 1 are what training at the edge of stability is made of (Cohen et al. 2021, arXiv
    2103.00065), and pass unmentioned; full-batch gradient descent stays above it for longer, small
    spikes and all, and trains: it is told of too. The step is good, and is taken.

    Args:
        bound: of the ratio; 1 is the edge.
        persist: readings in a row.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import ProbeReading, StepStats
    >>> d, told = Curvature(persist=2), []
    >>> for i, ratio in enumerate([0.9, 1.1, 0.9, 1.1, 1.2, 1.3]):
    ...     reading = ProbeReading("curvature_ratio", "", ratio)
    ...     stats = StepStats(step=i, loss=1.0, grad_norm=1.0, readings=(reading,))
    ...     told += [i] if d.check(stats) else []
    ...     d.update(stats)
    >>> told
    [4]
    """

    shared_by_ranks = "yes"

    def __init__(self, *, bound: float = 1.0, persist: int = 5) -> None:
        require(bound > 0, "bound", bound, "greater than 0")
        require(persist >= 1, "persist", persist, "at least 1")
        self.bound, self.persist = bound, persist
        self._high = 0
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        ratio = _ratio(stats)
        if self._told or ratio is None or not ratio > self.bound or self._high + 1 < self.persist:
            return None
        return Anomaly(
            kind="curvature beyond the edge",
            step=stats.step,
            value=ratio,
            signal="curvature_ratio",
            baseline=1.0,
            threshold=self.bound,
            optimizer=stats.optimizer,
            warn_only=True,
            message=f"the learning rate is {ratio:.3g} times what the curvature along the gradient "
            f"bears, after {self.persist} readings above 1 in a row: updates overshoot",
        )

    def update(self, stats: StepStats) -> None:
        """Count a reading; what was told is told once."""
        self._told = self._told or self.check(stats) is not None
        ratio = _ratio(stats)
        if ratio is not None:
            self._high = self._high + 1 if ratio > self.bound else 0

    def state_dict(self) -> dict[str, Any]:
        """Readings in a row that were high, and whether it was told."""
        return {"high": self._high, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""
        self._high, self._told = int(state["high"]), bool(state["told"])


def _ratio(stats: StepStats) -> float | None:
    found = stats.readings_of("curvature_ratio")
    return found[0].value if found else None
