"""Detects a gradient norm or loss far above its recent values."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from lit_stability.detectors.anomaly import Anomaly, require
from lit_stability.detectors.rejection_streak import RejectionStreak
from lit_stability.detectors.rolling_window import Window
from lit_stability.measurement.step_stats import StepStats
from lit_stability.renamed import renamed

_LARGEST_EXPONENT = 700.0
"""exp of more overflows a float."""

_APART = 5
"""Steps between two spikes that do not belong to the same burst."""
_SIMILAR = math.log(3.0)
"""How far above the largest known burst a value still belongs to the same population."""
_MOST_BURSTS = 16

_RECENT = 5
"""Number of last accepted values that reveal growth from step to step."""
_FEWEST = 3
"""Accepted values that the verdict by ``early_ratio`` needs, and compares with."""


class Spike:
    """Flags a gradient norm or loss far above the window of accepted values.

    A value is a spike if it is above ``ratio`` times the median of the window *and*, in logarithms,
    above the median by ``sigmas`` robust standard deviations, *and* above ``jump`` times the
    largest of the last five accepted values. The last condition spares values that grow from step
    to step, such as the swings at the edge of stability. The deviation is about the trend of the
    window (see `Window.spread`): a norm that falls a hundredfold within the window would otherwise
    hide a spike of a thousand times its size. Until the window has ``min_history`` values, a spike
    is a value above ``early_ratio`` times the largest of the last three: one gradient a thousand
    times too large keeps Adam's steps small for as long as its second moments remember it. A
    gradient that the Trainer clips counts with the norm that clipping leaves.

    Large values may belong to the run: an auxiliary loss every 50 steps, rare data, returns with
    heavy tails. A spike that does not vanish when its step is retried is remembered; after two such
    bursts, values up to three times as large are accepted. After ``accept_after`` consecutive
    rejections the detector accepts a change of regime: it clears the window, counts in ``regimes``
    and learns again from scratch. Replayed steps do not reset the count if the next rejection is at
    the same step.

    Args:
        signal: the field of `StepStats` to check; values that are not positive are ignored.
        ratio: smallest factor over the median that counts.
        sigmas: smallest excess over the median, in robust standard deviations of the logarithm.
        jump: smallest factor over the largest of the last five values that counts.
        window: number of accepted values in the window.
        min_history: accepted values before the verdict by ``ratio``, ``sigmas`` and ``jump``.
        early_ratio: factor over the largest of the last three values that counts before that. The
            largest of 8,460 gradient norms in the first 20 steps of healthy runs (the 252 kinds of
            `benchmarks.healthy`, two seeds) had a factor of 72.
        accept_after: consecutive rejections after which the window is cleared.

    Raises:
        ValueError: if an argument is out of its range.

    >>> from lit_stability.measurement.step_stats import StepStats
    >>> from lit_stability.detectors import flagged
    >>> d = Spike(min_history=3)
    >>> norms = [1.0, 1.2, 0.9, 1.1, 900.0, 1.0]
    >>> [i for i, x in enumerate(norms) if flagged(d, StepStats(step=i, loss=1.0, grad_norm=x))]
    [4]
    """

    @renamed(give_up="accept_after")
    def __init__(
        self,
        signal: Literal["grad_norm", "loss"] = "grad_norm",
        *,
        ratio: float = 20.0,
        sigmas: float = 8.0,
        jump: float = 5.0,
        window: int = 100,
        min_history: int = 20,
        early_ratio: float = 100.0,
        accept_after: int = 30,
    ) -> None:
        require(signal in ("grad_norm", "loss"), "signal", signal, "'grad_norm' or 'loss'")
        require(ratio > 1, "ratio", ratio, "greater than 1")
        require(sigmas > 0, "sigmas", sigmas, "greater than 0")
        require(jump >= 1, "jump", jump, "at least 1")
        require(0 < min_history <= window, "min_history", min_history, f"in 1..window={window}")
        require(early_ratio > 1, "early_ratio", early_ratio, "greater than 1")
        require(accept_after >= 1, "accept_after", accept_after, "at least 1")
        self.signal: Literal["grad_norm", "loss"] = signal
        self.ratio, self.sigmas, self.jump = ratio, sigmas, jump
        self.min_history, self.early_ratio = min_history, early_ratio
        self.accept_after = accept_after
        self.shared_by_ranks = "yes" if signal == "loss" else "no"
        self.window = Window(window)
        self._streak = RejectionStreak()
        self._bursts: list[float] = []
        """Logarithm of the largest value of each burst that is over."""
        self._burst: tuple[int, float] | None = None
        """Step and logarithm of the last spike, unless a retry showed that it was transient."""
        self._flagged: tuple[int, float] | None = None
        """Step and logarithm of the last spike."""
        self.regimes = 0

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if the value is a spike."""
        value: float = getattr(stats, self.signal)
        if not 0 < value < math.inf or len(self.window) < min(_FEWEST, self.min_history):
            return None
        applied = value
        if self.signal == "grad_norm" and stats.clip_norm is not None:
            applied = min(value, stats.clip_norm)
        median = math.exp(self.window.median)
        if applied <= self.ratio * median:
            return None
        threshold = self._threshold(median)
        if applied <= threshold or self._is_known(stats.step, math.log(value)):
            return None
        if self._streak.rejected(stats.step) > self.accept_after:
            self.reset_windows()
            self.regimes += 1
            return None
        label = "gradient norm" if self.signal == "grad_norm" else "loss"
        return Anomaly(
            kind="gradient spike" if self.signal == "grad_norm" else "loss spike",
            step=stats.step,
            value=value,
            signal=self.signal,
            baseline=median,
            threshold=threshold,
            optimizer=stats.optimizer,
            layers=tuple(stats.worst_layers()),
            message=f"{label} {value:.4g} is {value / median:.0f} times its median {median:.4g}",
        )

    def _threshold(self, median: float) -> float:
        """Value above which a value is a spike."""
        values = [*self.window.values]
        if len(values) < self.min_history:
            return self.early_ratio * math.exp(max(values[-_FEWEST:]))
        spread = math.exp(min(self.sigmas * self.window.spread, _LARGEST_EXPONENT))
        return max(median * max(self.ratio, spread), self.jump * math.exp(max(values[-_RECENT:])))

    def _is_known(self, step: int, value: float) -> bool:
        """Remembers a spike; returns whether spikes of its size belong to the run."""
        if self._burst is not None and step > self._burst[0] + _APART:
            self._bursts = [*self._bursts, self._burst[1]][-_MOST_BURSTS:]
            self._burst = None
        if len(self._bursts) >= 2 and value <= max(self._bursts) + _SIMILAR:
            return True
        before = value if self._burst is None else self._burst[1]
        self._burst, self._flagged = (step, max(value, before)), (step, value)
        return False

    def update(self, stats: StepStats) -> None:
        """Learns an accepted value."""
        value: float = getattr(stats, self.signal)
        if not 0 < value < math.inf:
            self._streak.accepted(stats.step)
            return
        if self._flagged == (stats.step, math.log(value)):
            return  # the step was taken although its value is a spike: it was clipped
        if self._burst is not None and self._burst[0] == stats.step:
            self._burst = None
        self._streak.accepted(stats.step)
        self.window.add(math.log(value))

    def reset_windows(self) -> None:
        """Clears window and count after a change of regime, in this or in another detector."""
        self.window.replace([])
        self._streak = RejectionStreak()

    def state_dict(self) -> dict[str, Any]:
        """Returns window and bursts; no count, so that no restore undoes a change of regime."""
        return {"window": list(self.window.values), "bursts": list(self._bursts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the window, and the bursts unless more are known by now."""
        self.window.replace(state["window"])
        if len(state.get("bursts", ())) > len(self._bursts):
            self._bursts = list(state["bursts"])
