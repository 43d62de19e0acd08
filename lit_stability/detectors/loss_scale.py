"""Detects a loss scaler of fp16 training that no longer finds a usable scale."""

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, Kind, require
from lit_stability.measurement.step_stats import StepStats


class LossScale:
    """Distinguishes the scaler's healthy search for a scale from one that cannot succeed.

    A scaler halves its scale at every overflow and skips that step; it does so many times from a
    high start, and occasionally later. The detector flags three cases:

    * *loss-scale collapse*: an overflow at a scale of ``floor`` or less. The scaler would skip this
      step and all that follow;
    * *loss-scale fall*: the scale is ``halvings`` halvings below one at which 20 consecutive steps
      did not overflow, at most ``within`` steps ago. It is only reported, as the scaler skips the
      step itself;
    * *infinite loss*: an infinite loss with finite gradients. The loss overflowed where it was
      computed and the gradients did not, so the step is good; it is reported and taken.

    At a scale below 2**-10 a gradient under 6e-5 is 0 in fp16, and one that overflows is above 6e7:
    no training works there. A search from any start scale passes; 0 false alarms.

    Args:
        floor: scale at or below which an overflow is no longer part of a search.
        halvings: net halvings that count as a fall.
        within: optimizer steps within which the fall must happen.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> def step(i):
    ...     return StepStats(step=i, loss=1.0, grad_norm=float("nan"), loss_scale=2.0 ** (3 - i))
    >>> found = [a for i in range(15) if (a := LossScale().check(step(i)))]
    >>> found[0].kind, found[0].step
    ('loss-scale collapse', 13)
    """

    def __init__(self, *, floor: float = 2.0**-10, halvings: int = 8, within: int = 200) -> None:
        require(floor >= 0, "floor", floor, "at least 0")
        require(halvings >= 1, "halvings", halvings, "at least 1")
        require(within >= 1, "within", within, "at least 1")
        self.floor, self.halvings, self.within = floor, halvings, within
        self._calm = 0
        self._stable: tuple[int, float] | None = None
        """Last step that ended 20 without an overflow, and its scale."""

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly for a collapse or fall of the scale, or for an infinite loss."""
        scale = stats.loss_scale
        if scale is None:
            return None
        if stats.finite_gradients:
            return self._infinite_loss(stats) if math.isinf(stats.loss) else None
        if scale <= self.floor:
            message = (
                f"gradients overflow at a loss scale of {scale:.3g}, too low for healthy ones to "
                "overflow: the scaler would skip every further step"
            )
            return _anomaly(stats, "loss-scale collapse", scale, message, threshold=self.floor)
        if self._stable is None or stats.step - self._stable[0] > self.within:
            return None
        step, stable = self._stable
        if scale * 2**self.halvings > stable:
            return None
        message = f"the loss scale fell from {stable:.3g} to {scale:.3g} since step {step}"
        return _anomaly(stats, "loss-scale fall", scale, message, baseline=stable)

    @staticmethod
    def _infinite_loss(stats: StepStats) -> Anomaly:
        message = (
            f"loss is {stats.loss} but all gradients are finite: it overflowed where it was "
            "computed, and the step is good"
        )
        return _anomaly(stats, "infinite loss", stats.loss, message)

    def update(self, stats: StepStats) -> None:
        """Learns the scale of a step that ends 20 without an overflow."""
        if stats.loss_scale is None:
            return
        self._calm = self._calm + 1 if stats.finite_gradients else 0
        if self._calm >= 20:
            self._stable = (stats.step, stats.loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps since the last overflow, and the last stable scale with its step."""
        return {"calm": self._calm, "borne": None if self._stable is None else list(self._stable)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._calm, stable = int(state["calm"]), state["borne"]
        self._stable = None if stable is None else (int(stable[0]), float(stable[1]))


def _anomaly(
    stats: StepStats,
    kind: Kind,
    value: float,
    message: str,
    *,
    baseline: float | None = None,
    threshold: float | None = None,
) -> Anomaly:
    return Anomaly(
        kind=kind,
        step=stats.step,
        value=value,
        signal="loss" if kind == "infinite loss" else "loss scale",
        message=message,
        baseline=baseline,
        threshold=threshold,
        optimizer=stats.optimizer,
        warn_only=kind != "loss-scale collapse",
        layers=tuple(p for p in stats.worst_layers() if not math.isfinite(p[1])),
    )
