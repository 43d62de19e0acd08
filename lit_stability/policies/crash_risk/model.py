"""From the trends of a run to the risk that it diverges within 20 steps.

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
"""Optimizer steps that the risk looks ahead."""

COEFFICIENTS = (1.01, 0.72, 0.28, 0.31, 0.84)
"""Of `FEATURES`, in logits. By ``python -m benchmarks.prediction --fit`` on 396 runs of 33
families: of 86,463 accepted steps 3.4 % were followed by a divergence within 20 steps. A risk is a
share of moments like these; where divergences are rarer it is too high, its order remains."""
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
"""From the logistic function to the share of moments that a divergence followed, with straight
lines between the points; the same moments, by bins of the logistic function."""


class CrashRisk:
    """The risk that a run diverges within the next 20 steps, from its accepted steps.

    It is an estimate from `Trends`, so that what gives no notice has none: a bad batch, a learning
    rate that jumps to what kills within three steps. One outlier is no trend. It is 0 until there
    are 20 accepted steps with a loss above 0. Values that are not finite teach nothing.

    A divergence is a loss that is not finite, or one that rises above three times the best level
    of the run and above half the way back to where the run began, and stays there.

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
        """After the step last taken up, in [0, 1]."""

    def update(self, stats: StepStats) -> float:
        """Take up an accepted step; returns the risk from then on.

        Args:
            stats: as measured before its update.
        """
        self._trends.update(stats)
        self.value = risk_of(self._trends.features()) if self._trends.known else 0.0
        return self.value

    def in_words(self) -> str:
        """The risk, and the two trends that say most for it."""
        head = f"risk {self.value:.2f} of a divergence within {HORIZON} steps"
        if not self._trends.known:
            return head
        shares = [c * f for c, f in zip(COEFFICIENTS, self._trends.features(), strict=True)]
        said = sorted(zip(shares, self._trends.in_words(), strict=True), reverse=True)
        return f"{head} ({', '.join(words for share, words in said[:2] if share > 0)})"

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, in plain values."""
        return {"trends": self._trends.state_dict(), "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""
        self._trends.load_state_dict(state["trends"])
        self.value = float(state["value"])


def risk_of(features: Sequence[float]) -> float:
    """The risk for features in the order of `FEATURES`; it rises with each.

    >>> risk_of([0, -3, 0, 0, 0]) < 0.01 < 0.9 < risk_of([4, 1, 3, 1, 3])
    True

    Raises:
        ValueError: if there are more features, or fewer.
    """
    if len(features) != len(FEATURES):
        raise ValueError(f"features must be {len(FEATURES)} numbers, got {features!r}")
    logit = INTERCEPT + sum(c * f for c, f in zip(COEFFICIENTS, features, strict=True))
    return calibrated(1 / (1 + math.exp(-logit)), CALIBRATION)


def calibrated(score: float, points: Sequence[tuple[float, float]]) -> float:
    """A score on a line through points.

    >>> calibrated(0.75, ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)))
    0.75

    Args:
        score: in [0, 1].
        points: in the order of their scores, the first of 0 and the last of 1.
    """
    i = min(bisect_right(points, (score, 1.0)), len(points) - 1)
    (left, low), (right, high) = points[i - 1], points[i]
    return low + (high - low) * (score - left) / (right - left)
