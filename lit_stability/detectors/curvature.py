"""Detects a learning rate that is too high for the curvature along the gradient.

Uses the readings of a `CurvatureProbe`; without one it flags nothing.
"""

from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.measurement.step_stats import StepStats


class Curvature:
    """Warns, once, when the curvature ratio stays above ``bound`` for ``persist`` readings.

    Above 1 an update overshoots: the loss along the gradient rises. If that lasts, the loss spikes
    (arXiv 2506.04805: a spike starts when the curvature along the gradient stays above
    2 / learning rate because Adam's second moment does not follow). One to three readings above 1
    are normal at the edge of stability (Cohen et al. 2021, arXiv 2103.00065) and are ignored.
    Full-batch gradient descent stays above 1 for longer, with small spikes, and still trains; it is
    reported as well. The step is good and is taken.

    Args:
        bound: largest ratio that is tolerated; 1 is the edge of stability.
        persist: consecutive readings above ``bound``.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import ProbeReading, StepStats
    >>> d, reported = Curvature(persist=2), []
    >>> for i, ratio in enumerate([0.9, 1.1, 0.9, 1.1, 1.2, 1.3]):
    ...     reading = ProbeReading("curvature_ratio", "", ratio)
    ...     stats = StepStats(step=i, loss=1.0, grad_norm=1.0, readings=(reading,))
    ...     reported += [i] if d.check(stats) else []
    ...     d.update(stats)
    >>> reported
    [4]
    """

    shared_by_ranks = "yes"

    def __init__(self, *, bound: float = 1.0, persist: int = 5) -> None:
        require(bound > 0, "bound", bound, "greater than 0")
        require(persist >= 1, "persist", persist, "at least 1")
        self.bound, self.persist = bound, persist
        self._high = 0
        self._reported = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if enough consecutive readings were above the bound."""
        ratio = _ratio(stats)
        if (
            self._reported
            or ratio is None
            or not ratio > self.bound
            or self._high + 1 < self.persist
        ):
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
            message=f"the learning rate is {ratio:.3g} times the largest that the curvature along "
            f"the gradient allows, after {self.persist} consecutive readings above 1: updates "
            "overshoot",
        )

    def update(self, stats: StepStats) -> None:
        """Counts the reading of an accepted step."""
        self._reported = self._reported or self.check(stats) is not None
        ratio = _ratio(stats)
        if ratio is not None:
            self._high = self._high + 1 if ratio > self.bound else 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of consecutive high readings, and whether they were reported."""
        return {"high": self._high, "told": self._reported}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._high, self._reported = int(state["high"]), bool(state["told"])


def _ratio(stats: StepStats) -> float | None:
    readings = stats.readings_of("curvature_ratio")
    return readings[0].value if readings else None
