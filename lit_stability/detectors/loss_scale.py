"""The loss scaler of fp16 training: its ordinary search, and its death."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, Kind, require
from lit_stability.measurement.step_stats import StepStats


class LossScale:
    """Tells the scaler's search for a scale, which is healthy, from one that will find none.

    A scaler halves its scale at every overflow and leaves that step out; from a high start it does
    so many times, and now and then ever after. Objected to is

    * *loss-scale collapse*: an overflow at ``floor`` or below, down to a scale of 0. The step would
      be left out anyway, and so will be all that follow;
    * *loss-scale fall*: the scale is ``halvings`` halvings below what 20 steps in a row have borne
      within the last ``within`` steps. The step is the scaler's; it is told of;
    * *infinite loss*: an infinite loss with finite gradients. The loss has overflowed where it was
      computed, the gradients have not: the step is as good as any, and taken.

    Below a scale of 2**-10 a gradient under 6e-5 is 0 in fp16, and one that overflows is above 6e7:
    no training that works is there. A search from any scale passes; 0 false alarms.

    Args:
        floor: scale at which an overflow is no search any more.
        halvings: net halvings that make a fall.
        within: optimizer steps.

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
        self._borne: tuple[int, float] | None = None
        """Last step of 20 without an overflow, and its scale."""

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        scale = stats.loss_scale
        if scale is None:
            return None
        if stats.finite_gradients:
            return self._infinite_loss(stats) if math.isinf(stats.loss) else None
        if scale <= self.floor:
            message = (
                f"gradients overflow at a loss scale of {scale:.3g}, at which none can: every "
                "further step would be left out"
            )
            return _anomaly(stats, "loss-scale collapse", scale, message, threshold=self.floor)
        if self._borne is None or stats.step - self._borne[0] > self.within:
            return None
        step, borne = self._borne
        if scale * 2**self.halvings > borne:
            return None
        message = f"the loss scale fell from {borne:.3g} to {scale:.3g} since step {step}"
        return _anomaly(stats, "loss-scale fall", scale, message, baseline=borne)

    @staticmethod
    def _infinite_loss(stats: StepStats) -> Anomaly:
        message = (
            f"loss is {stats.loss} but all gradients are finite: it overflowed where it was "
            "computed, and the step is good"
        )
        return _anomaly(stats, "infinite loss", stats.loss, message)

    def update(self, stats: StepStats) -> None:
        """Learn which scale is borne."""
        if stats.loss_scale is None:
            return
        self._calm = self._calm + 1 if stats.finite_gradients else 0
        if self._calm >= 20:
            self._borne = (stats.step, stats.loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """The scale that was borne."""
        return {"calm": self._calm, "borne": None if self._borne is None else list(self._borne)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self._calm, borne = int(state["calm"]), state["borne"]
        self._borne = None if borne is None else (int(borne[0]), float(borne[1]))


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
