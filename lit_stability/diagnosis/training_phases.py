"""Gradient norms of a run in each phase: warm-up, descent, plateau.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lit_stability.detectors.trends import Plateau

Phase = Literal["warm-up", "descent", "plateau"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_WIDTH = math.log(1.05)
"""Bin width of the norm's logarithm: the error is at most 2.5 %, with 4000 bins at most or so."""


@dataclass(frozen=True, kw_only=True)
class PhaseRange:
    """Gradient norms of one phase: 90 % of its steps were between ``low`` and ``high``."""

    phase: Phase
    first_step: int
    last_step: int
    steps: int
    low: float
    """5th percentile."""
    middle: float
    """Median."""
    high: float
    """95th percentile."""

    def in_words(self) -> str:
        """Returns a one-line description."""
        return (
            f"{self.phase} (steps {self.first_step} to {self.last_step}): gradient norm "
            f"{self.low:.3g} to {self.high:.3g}, median {self.middle:.3g}"
        )


@dataclass
class _Tally:
    """Counts of norms by bin; a norm of 0 has its own bin, below all others."""

    first: int
    last: int = 0
    bins: dict[int, int] = field(default_factory=dict)

    def add(self, step: int, norm: float) -> None:
        key = -10_000 if norm <= 0 else round(math.log(norm) / _WIDTH)
        self.bins[key] = self.bins.get(key, 0) + 1
        self.last = step

    def quantile(self, share: float) -> float:
        wanted, seen = share * sum(self.bins.values()), 0
        for key in sorted(self.bins):
            seen += self.bins[key]
            if seen >= wanted:
                return 0.0 if key == -10_000 else math.exp(key * _WIDTH)
        raise AssertionError(f"share must be in [0, 1], got {share!r}")


class PhaseRanges:
    """Assigns the accepted steps of a run to phases and counts their gradient norms.

    * *warm-up*: the learning rate reached a new maximum within the last ``stable_after`` steps. A
      run whose learning rate never rises has no warm-up.
    * *plateau*: for ``patience`` consecutive blocks of ``block`` steps, the median loss was not 1 %
      below the lowest so far; the plateau ends with a block that is.
    * *descent*: all other steps.

    The ranges describe this run only, for comparison with a norm; nothing is judged by them.

    Args:
        stable_after: optimizer steps.
        block: optimizer steps.
        patience: blocks.

    Raises:
        ValueError: if an argument is less than 1.

    >>> ranges = PhaseRanges(stable_after=2, block=5, patience=2)
    >>> for step in range(60):
    ...     rate, loss = min(step, 10) / 10, max(1.0, 10.0 - step / 3)
    ...     ranges.update(step, loss, 8.0 if step < 10 else 2.0 if step < 40 else 0.5, rate)
    >>> for each in ranges.ranges():
    ...     print(each.phase, each.first_step, each.last_step, round(each.middle, 1))
    warm-up 1 11 8.1
    descent 12 38 2.0
    plateau 39 59 0.5
    """

    def __init__(self, *, stable_after: int = 50, block: int = 100, patience: int = 5) -> None:
        for name, value in (
            ("stable_after", stable_after),
            ("block", block),
            ("patience", patience),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        self.stable_after, self.block, self.patience = stable_after, block, patience
        self.phase: Phase = "descent"
        """Phase of the last step."""
        self._peak: float | None = None
        self._since_rise = stable_after
        self._plateau = Plateau(block=block)
        self._tallies: dict[str, _Tally] = {}

    def update(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Adds an accepted step.

        The first step is not counted, since its phase is not known, nor is a step with a
        non-finite loss or norm.

        Args:
            step: number of optimizer steps before it.
            loss: loss of the step.
            grad_norm: norm of all gradients, unclipped.
            learning_rate: largest scheduled learning rate of the groups.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return
        first = self._peak is None
        self._follow_rate(learning_rate)
        self._plateau.update(loss)
        if first:
            return
        if self._since_rise < self.stable_after:
            self.phase = "warm-up"
        else:
            self.phase = "plateau" if self._plateau.stale >= self.patience else "descent"
        self._tallies.setdefault(self.phase, _Tally(step)).add(step, grad_norm)

    def _follow_rate(self, rate: float) -> None:
        risen = self._peak is not None and rate > self._peak
        self._since_rise = 0 if risen else self._since_rise + 1
        self._peak = rate if self._peak is None else max(self._peak, rate)

    def range_of(self, phase: Phase) -> PhaseRange | None:
        """Returns the norms of a phase; None if no step was in it."""
        tally = self._tallies.get(phase)
        if tally is None:
            return None
        return PhaseRange(
            phase=phase,
            first_step=tally.first,
            last_step=tally.last,
            steps=sum(tally.bins.values()),
            low=tally.quantile(0.05),
            middle=tally.quantile(0.5),
            high=tally.quantile(0.95),
        )

    def ranges(self) -> tuple[PhaseRange, ...]:
        """Returns the norms of each phase that has steps."""
        return tuple(found for phase in PHASES if (found := self.range_of(phase)))

    def state_dict(self) -> dict[str, Any]:
        """Returns phase and counts as plain values."""
        return {
            "phase": self.phase,
            "peak": self._peak,
            "since_rise": self._since_rise,
            "plateau": self._plateau.state_dict(),
            "tallies": {
                phase: {"first": t.first, "last": t.last, "bins": dict(t.bins)}
                for phase, t in self._tallies.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.phase = state["phase"]
        self._peak, self._since_rise = state["peak"], int(state["since_rise"])
        self._plateau.load_state_dict(state["plateau"])
        self._tallies = {
            phase: _Tally(int(t["first"]), int(t["last"]), dict(t["bins"]))
            for phase, t in state["tallies"].items()
        }
