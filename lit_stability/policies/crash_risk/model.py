"""Estimates the risk that a run diverges within 20 steps from its trends.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.crash_risk.trends import FEATURES, Trends

HORIZON = 20
"""Horizon of the risk, in optimizer steps."""

COEFFICIENTS = (1.01, 0.72, 0.28, 0.31, 0.84)
"""Coefficients of `FEATURES`, in logits, fitted by ``python -m benchmarks.prediction --fit`` to 396
runs of 33 families: of 86,463 accepted steps 3.4 % were followed by a divergence within 20 steps.
The risk is calibrated for this rate; where divergences are rarer it is too high, but its order is
still right."""
INTERCEPT = -3.61
CALIBRATION = (
    (0.0, 0.0),
    (0.007, 0.009),
    (0.031, 0.021),
    (0.069, 0.055),
    (0.14, 0.151),
    (0.244, 0.285),
    (0.347, 0.381),
    (0.469, 0.582),
    (0.618, 0.587),
    (0.774, 0.719),
    (0.911, 0.78),
    (1.0, 1.0),
)
"""Value of the logistic function -> share of steps followed by a divergence, for the same steps, in
bins of the logistic function; linear interpolation between the points."""


class CrashRisk:
    """Estimates the risk that a run diverges within the next 20 steps from its accepted steps.

    The estimate uses `Trends`, so it cannot predict what comes without a trend: a bad batch, or a
    learning rate that jumps to a value that diverges within three steps. One outlier is no trend.
    The risk is 0 until there are 20 accepted steps with a loss above 0. Non-finite values are
    ignored.

    A divergence is a non-finite loss, or a loss that rises above three times the best level of the
    run and above half the way back to the loss at the start, and stays there.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> risk, losses = CrashRisk(), [2.1, 2.0] * 20
    >>> def last(losses):
    ...     return [risk.update(StepStats(step=0, loss=x, grad_norm=x)) for x in losses][-1]
    >>> round(last(losses), 2), round(last([2.1, 2.2, 2.5, 3.1, 4.8]), 2)
    (0.02, 0.59)
    """

    def __init__(self) -> None:
        self._trends = Trends()
        self.value = 0.0
        """Risk after the last accepted step, in [0, 1]."""

    def update(self, stats: StepStats) -> float:
        """Adds an accepted step and returns the risk after it.

        Args:
            stats: its measurement, before the update.
        """
        self._trends.update(stats)
        self.value = risk_of(self._trends.features()) if self._trends.known else 0.0
        return self.value

    def in_words(self) -> str:
        """Returns the risk and the two trends that contribute most to it."""
        head = f"risk {self.value:.2f} of a divergence within {HORIZON} steps"
        if not self._trends.known:
            return head
        shares = [c * f for c, f in zip(COEFFICIENTS, self._trends.features(), strict=True)]
        trends = sorted(zip(shares, self._trends.in_words(), strict=True), reverse=True)
        return f"{head} ({', '.join(words for share, words in trends[:2] if share > 0)})"

    def state_dict(self) -> dict[str, Any]:
        """Returns trends and risk as plain values."""
        return {"trends": self._trends.state_dict(), "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._trends.load_state_dict(state["trends"])
        self.value = float(state["value"])


def risk_of(features: Sequence[float]) -> float:
    """Returns the risk for given features; it increases with each of them.

    >>> risk_of([0, -3, 0, 0, 0]) < 0.01 < 0.9 < risk_of([4, 1, 3, 1, 3])
    True

    Args:
        features: in the order of `FEATURES`.

    Raises:
        ValueError: if the number of features is wrong.
    """
    if len(features) != len(FEATURES):
        raise ValueError(f"features must be {len(FEATURES)} numbers, got {features!r}")
    logit = INTERCEPT + sum(c * f for c, f in zip(COEFFICIENTS, features, strict=True))
    return calibrated(1 / (1 + math.exp(-logit)), CALIBRATION)


def calibrated(score: float, points: Sequence[tuple[float, float]]) -> float:
    """Returns the linear interpolation of points at a score.

    >>> calibrated(0.75, ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)))
    0.75

    Args:
        score: in [0, 1].
        points: ``(score, value)`` pairs in ascending order, the first score 0 and the last 1.
    """
    i = min(bisect_right(points, (score, 1.0)), len(points) - 1)
    (left, low), (right, high) = points[i - 1], points[i]
    return low + (high - low) * (score - left) / (right - left)
