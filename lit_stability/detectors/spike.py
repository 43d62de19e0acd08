"""A value far above what the run has shown of late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rejection_streak import Row
from lit_stability.detectors.rolling_window import Window
from lit_stability.measurement.step_stats import StepStats

_LARGEST_EXPONENT = 700.0
"""exp of more is beyond a float."""

_RECENT = 5
"""Accepted values that show a growth from step to step."""


class Spike:
    """Objects to a gradient norm or loss far above the window of accepted ones.

    A value is a spike when it is above ``ratio`` times the median of the window *and*, in
    logarithms, above the median by ``sigmas`` robust standard deviations, *and* above ``jump``
    times the largest of the last five accepted: what grows from step to step, as the swings of
    descent on the edge of stability, is no spike. The deviation is that about the trend of the
    window, see `Window.spread`: a norm that falls a hundredfold within it would otherwise hide one
    of a thousand times its size. After ``give_up`` refusals in a row the values are a new regime:
    the window is emptied, ``regimes`` counts it, and learning starts anew. Steps that are taken
    again after a rollback do not end the row, if it goes on at the step where it was before.

    Args:
        signal: which field of `StepStats`; it must be positive, other values pass unlearnt.
        ratio: smallest factor over the median that counts.
        sigmas: robust standard deviations of the logarithm that count.
        jump: smallest factor over the largest of the last five values that counts.
        window: accepted values remembered.
        min_history: accepted values before the first verdict.
        give_up: refusals in a row after which the window is emptied.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> from lit_stability.detectors import flagged
    >>> d = Spike(min_history=3)
    >>> norms = [1.0, 1.2, 0.9, 1.1, 900.0, 1.0]
    >>> [i for i, x in enumerate(norms) if flagged(d, StepStats(step=i, loss=1.0, grad_norm=x))]
    [4]
    """

    def __init__(
        self,
        signal: Literal["grad_norm", "loss"] = "grad_norm",
        *,
        ratio: float = 20.0,
        sigmas: float = 8.0,
        jump: float = 5.0,
        window: int = 100,
        min_history: int = 20,
        give_up: int = 30,
    ) -> None:
        require(signal in ("grad_norm", "loss"), "signal", signal, "'grad_norm' or 'loss'")
        require(ratio > 1, "ratio", ratio, "greater than 1")
        require(sigmas > 0, "sigmas", sigmas, "greater than 0")
        require(jump >= 1, "jump", jump, "at least 1")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        require(give_up >= 1, "give_up", give_up, "at least 1")
        self.signal: Literal["grad_norm", "loss"] = signal
        self.ratio, self.sigmas, self.jump = ratio, sigmas, jump
        self.min_history, self.give_up = min_history, give_up
        self.shared_by_ranks = "yes" if signal == "loss" else "no"
        self.window = Window(window)
        self._row = Row()
        self.regimes = 0

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        value: float = getattr(stats, self.signal)
        if not 0 < value < math.inf or len(self.window) < self.min_history:
            return None
        median = math.exp(self.window.median)
        if value <= self.ratio * median:
            return None
        spread = math.exp(min(self.sigmas * self.window.spread, _LARGEST_EXPONENT))
        recent = max([*self.window.values][-_RECENT:])
        threshold = max(median * max(self.ratio, spread), self.jump * math.exp(recent))
        if value <= threshold:
            return None
        if self._row.refused(stats.step) > self.give_up:
            self.reset_windows()
            self.regimes += 1
            return None
        what = "gradient norm" if self.signal == "grad_norm" else "loss"
        return Anomaly(
            kind="gradient spike" if self.signal == "grad_norm" else "loss spike",
            step=stats.step,
            value=value,
            signal=self.signal,
            baseline=median,
            threshold=threshold,
            optimizer=stats.optimizer,
            layers=tuple(stats.worst_layers()),
            message=f"{what} {value:.4g} is {value / median:.0f} times its median {median:.4g}",
        )

    def update(self, stats: StepStats) -> None:
        """Learn an accepted value."""
        value: float = getattr(stats, self.signal)
        self._row.accepted(stats.step)
        if 0 < value < math.inf:
            self.window.add(math.log(value))

    def reset_windows(self) -> None:
        """Forget what was normal, here or for another detector of the run."""
        self.window.replace([])
        self._row = Row()

    def state_dict(self) -> dict[str, Any]:
        """The window; a count of refusals is not part of it, so no restore can undo a give-up."""
        return {"window": list(self.window.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a window back."""
        self.window.replace(state["window"])
