"""Gradients that have outgrown Adam's second moment: what comes before a loss spike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rolling_window import Window
from lit_stability.measurement.step_stats import StepStats

_BUILD_UP = 2
"""Steps above half of the bound, before the high ones."""


class StaleMoments:
    """Tells, once, of gradients that for several steps are far above Adam's second moment.

    The update divides each gradient by the root of the second moment, which remembers
    ``1 / (1 - beta2)`` steps. Where gradients fall for long and then grow faster than that, updates
    are too large, and the loss spikes: a ratio above 2.3 came 1 to 8 steps before it (Wortsman et
    al. 2023, arXiv 2304.13013). A step is high when ``moment_rms`` is above ``bound``
    *and* above ``ratio`` times the median of its window *and*, in logarithms, above it by
    ``sigmas`` robust standard deviations. It is told at the ``persist``-th in a row, if two steps
    before them were above half of the bound already: an instability builds up, and noise does not.
    The step is taken and learnt.

    It is not in the default set: a Transformer that warmed up as it should was told of as well, at
    a bias whose gradients are tiny and mean nothing.

    Args:
        bound: smallest ratio that counts; with ``beta2`` it cannot exceed ``1/sqrt(1 - beta2)``.
        ratio: smallest factor over the median that counts.
        sigmas: robust standard deviations of the logarithm that count.
        persist: high steps in a row.
        window: values remembered.
        min_history: values before the first verdict.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> d, told = StaleMoments(min_history=5), []
    >>> for i, rms in enumerate([1.0, 1.1, 0.9, 1.0, 1.0, 3.0, 1.0, 1.4, 1.9, 2.6, 3.1, 3.6]):
    ...     stats = StepStats(step=i, loss=1.0, grad_norm=1.0, moment_rms=rms)
    ...     told += [i] if d.check(stats) else []
    ...     d.update(stats)
    >>> told
    [11]
    """

    def __init__(
        self,
        *,
        bound: float = 2.3,
        ratio: float = 2.0,
        sigmas: float = 2.0,
        persist: int = 3,
        window: int = 100,
        min_history: int = 20,
    ) -> None:
        require(bound > 1, "bound", bound, "greater than 1")
        require(ratio > 1, "ratio", ratio, "greater than 1")
        require(sigmas > 0, "sigmas", sigmas, "greater than 0")
        require(persist >= 1, "persist", persist, "at least 1")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        self.bound, self.ratio, self.sigmas = bound, ratio, sigmas
        self.persist, self.min_history = persist, min_history
        self.window = Window(window)
        self._high = self._raised = 0
        self._told = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        rms = stats.moment_rms
        if self._told or rms is None or not self._is_high(rms):
            return None
        if self._high + 1 < self.persist or self._raised < self.persist - 1 + _BUILD_UP:
            return None
        usual = math.exp(self.window.median)
        return Anomaly(
            kind="stale second moment",
            step=stats.step,
            value=rms,
            signal="moment_rms",
            baseline=usual,
            threshold=max(self.bound, self.ratio * usual),
            optimizer=stats.optimizer,
            warn_only=True,
            layers=((stats.moment_rms_name, rms),),
            message=f"for {self.persist} steps gradients have been beyond what Adam's second "
            f"moment expects, by a factor of {rms:.3g} in {stats.moment_rms_name or 'a parameter'} "
            f"(usual: {usual:.2g}): its updates are too large",
        )

    def update(self, stats: StepStats) -> None:
        """Learn an accepted value; what was told is told once."""
        rms = stats.moment_rms
        if rms is None or not 0 < rms < math.inf:
            return
        self._told = self._told or self.check(stats) is not None
        self._high = self._high + 1 if self._is_high(rms) else 0
        self._raised = self._raised + 1 if rms > self.bound / 2 else 0
        self.window.add(math.log(rms))

    def _is_high(self, rms: float) -> bool:
        if not self.bound < rms < math.inf or len(self.window) < self.min_history:
            return False
        above = math.log(rms) - self.window.median
        return above > max(math.log(self.ratio), self.sigmas * self.window.sigma)

    def state_dict(self) -> dict[str, Any]:
        """The window, the steps so far that count, and whether it was told."""
        return {
            "window": list(self.window.values),
            "high": self._high,
            "raised": self._raised,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put such a state back."""
        self.window.replace(state["window"])
        self._high, self._raised = int(state["high"]), int(state["raised"])
        self._told = bool(state["told"])
