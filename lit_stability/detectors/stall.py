"""Lower layers that the gradient no longer reaches while the loss stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.course import LossCourse, RateCourse
from lit_stability.stats import StepStats

_EVERY = 10
"""Steps between looks at the depth: what is sought lasts for hundreds."""


class Stall:
    """Objects, once an episode, to a gradient that dies on its way down while the loss stands.

    Looked at is the median gradient norm of the first third of the parameters over that of the last
    third, in the order in which the model registered them, on one step in ten. An episode is
    ``persist`` such ratios in a row below ``share``, with a settled learning rate and a loss that
    has not fallen for two blocks. A first third whose median is exactly 0 is for `DeadGradients`.

    The known case is a deep post-norm Transformer without warm-up (Xiong et al. 2020,
    arXiv 2002.04745): within ten steps its residual stream is dominated by its branches, each
    layer passes on a tenth of the gradient, and the loss stands at the entropy of its single
    tokens. The total gradient norm looks healthy all the while.

    Args:
        share: ratio of the medians.
        persist: looks in a row, ten steps apart.
        block: losses per median; see `LossCourse`.

    Raises:
        ValueError: if an argument is out of its range.

    >>> d = Stall(persist=3, block=10)
    >>> for i in range(200):
    ...     stats = StepStats(step=i, loss=3.1, grad_norm=0.5, learning_rates=(0.1,),
    ...                       names=("low", "middle", "high"), grad_norms=(1e-4, 0.02, 0.5))
    ...     if anomaly := d.check(stats):
    ...         print(i, anomaly.message)
    ...     d.update(stats)
    60 the first third of the parameters receives 0.0002 of the gradient of the last third
    """

    def __init__(self, *, share: float = 0.02, persist: int = 10, block: int = 50) -> None:
        require(0 < share < 1, "share", share, "in (0, 1)")
        require(persist >= 1, "persist", persist, "at least 1")
        self.share, self.persist = share, persist
        self._rate, self._course = RateCourse(), LossCourse(block=block)
        self._steps = 0
        self._low_for = 0
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        if self._told or self._steps % _EVERY or self._low_for + 1 < self.persist:
            return None
        ratio = _passed_down(stats)
        if ratio is None or ratio >= self.share:
            return None
        if not self._rate.settled or self._course.stale < 2:
            return None
        third = len(stats.names) // 3
        first = list(zip(stats.names, stats.grad_norms, strict=True))[:third]
        return Anomaly(
            kind="stalled layers",
            step=stats.step,
            value=ratio,
            signal="grad_norm",
            baseline=1.0,
            threshold=self.share,
            optimizer=stats.optimizer,
            observe_only=True,
            layers=tuple(sorted(first, key=lambda pair: pair[1])[:5]),
            message=f"the first third of the parameters receives {ratio:.2g} of the gradient of "
            "the last third",
        )

    def update(self, stats: StepStats) -> None:
        """Learn an accepted step; what was objected to is told of once."""
        self._told = self._told or self.check(stats) is not None
        self._rate.update(stats)
        self._course.update(stats.loss)
        if self._steps % _EVERY == 0 and (ratio := _passed_down(stats)) is not None:
            self._low_for = self._low_for + 1 if ratio < self.share else 0
            self._told = self._told and ratio < self.share
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The courses, the counts, and whether it was told."""
        return {
            "rate": self._rate.state_dict(),
            "course": self._course.state_dict(),
            "steps": self._steps,
            "low_for": self._low_for,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._rate.load_state_dict(state["rate"])
        self._course.load_state_dict(state["course"])
        self._steps, self._low_for = int(state["steps"]), int(state["low_for"])
        self._told = bool(state["told"])


def _passed_down(stats: StepStats) -> float | None:
    """Median norm of the first third of the parameters over that of the last; None if not known."""
    third = len(stats.grad_norms) // 3
    if not third or not stats.finite_gradients:
        return None
    low, high = median(stats.grad_norms[:third]), median(stats.grad_norms[-third:])
    return low / high if low > 0 and 0 < high < math.inf else None
