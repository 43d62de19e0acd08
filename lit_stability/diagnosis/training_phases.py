"""The gradient norms that a run itself has had, phase by phase: warm-up, descent, plateau.

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
"""Of a bin of the norm's logarithm: what is told is right to 2.5 %, in at most some 4000 bins."""


@dataclass(frozen=True, kw_only=True)
class PhaseRange:
    """The gradient norms of one phase: nine steps in ten were within ``low`` and ``high``."""

    phase: Phase
    first_step: int
    last_step: int
    steps: int
    low: float
    """Five in a hundred are below."""
    middle: float
    """Median."""
    high: float
    """Five in a hundred are above."""

    def in_words(self) -> str:
        """One line for the console."""
        return (
            f"{self.phase} (steps {self.first_step} to {self.last_step}): gradient norm "
            f"{self.low:.3g} to {self.high:.3g}, median {self.middle:.3g}"
        )


@dataclass
class _Tally:
    """Counts of norms by bin; a norm of 0 has a bin of its own, below all others."""

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
        raise AssertionError("a share of at most 1")


class PhaseRanges:
    """Sorts the accepted steps of a run into phases, and counts their gradient norms.

    * *warm-up*: the learning rate has risen above all before within the last ``stable_after``
      steps. A run whose rate never rises has none.
    * *plateau*: the median loss of ``block`` steps was not lower than the lowest so far, by a
      hundredth of it, for ``patience`` blocks in a row; it ends with a block that is.
    * *descent*: all other steps.

    Nothing is judged: the ranges are what this run had, for the eye to compare a norm with.

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
        """Of the last step."""
        self._peak: float | None = None
        self._since_rise = stable_after
        self._plateau = Plateau(block=block)
        self._tallies: dict[str, _Tally] = {}

    def update(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Learn from an accepted step; the first, whose phase nothing tells yet, is left out.

        So is one with a loss or norm that is not finite.

        Args:
            step: optimizer steps before it.
            loss: of the step.
            grad_norm: of all gradients, unclipped.
            learning_rate: the scheduler's, the largest of the groups.
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
        """The norms of a phase; None where it has not been."""
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
        """The norms of each phase that has been."""
        return tuple(found for phase in PHASES if (found := self.range_of(phase)))

    def state_dict(self) -> dict[str, Any]:
        """What was counted, in plain values."""
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
        """Put such a state back."""
        self.phase = state["phase"]
        self._peak, self._since_rise = state["peak"], int(state["since_rise"])
        self._plateau.load_state_dict(state["plateau"])
        self._tallies = {
            phase: _Tally(int(t["first"]), int(t["last"]), dict(t["bins"]))
            for phase, t in state["tallies"].items()
        }
