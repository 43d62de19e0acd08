"""Chooses the precision of a run: a larger range after an overflow, the former one when it is calm.

Imports neither torch nor Lightning. A rollback does not restore its state; checkpoints contain it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PRECISIONS = ("16-true", "bf16-true", "16-mixed", "bf16-mixed", "32-true")
"""Lightning's names; the smallest range and the fewest bits come first."""


def lower_precisions(precision: str) -> tuple[str, ...]:
    """Returns the default fallback precisions of a precision.

    >>> lower_precisions("16-mixed"), lower_precisions("bf16-true"), lower_precisions("32-true")
    (('bf16-mixed', '32-true'), ('bf16-mixed', '32-true'), ())
    """
    wanted = ("bf16-mixed", "32-true")
    return tuple(p for p in wanted if precision in PRECISIONS and is_below(p, precision))


def is_below(level: str, precision: str) -> bool:
    """Returns whether a precision comes after another in `PRECISIONS`."""
    return PRECISIONS.index(level) > PRECISIONS.index(precision)


class PrecisionPolicy:
    """Falls back one precision level at a time, and retries the faster one after a calm period.

    A retry fails if the next fallback comes within ``wait`` healthy steps: this doubles ``wait``.
    After ``failures`` failed retries the policy stays where it is. It never returns to
    half-precision weights, since their rounding errors persist. So there are at most
    ``levels + failures`` fallbacks, however the run behaves.

    Args:
        home: precision in which the run was started.
        levels: fallback precisions, in order.
        wait: healthy steps before the faster precision is retried.
        failures: number of retries that may fail.

    >>> escalation = PrecisionPolicy("16-mixed", ["bf16-mixed", "32-true"], wait=2, failures=1)
    >>> escalation.down(), [escalation.healthy() for _ in range(2)], escalation.current
    ('bf16-mixed', [None, '16-mixed'], '16-mixed')
    >>> escalation.down(), [escalation.healthy() for _ in range(9)].count(None)
    ('bf16-mixed', 9)
    """

    def __init__(self, home: str, levels: Sequence[str], *, wait: int, failures: int) -> None:
        self._names = (home, *levels)
        self._failures = failures
        self._top = 1 if home.endswith("-true") else 0
        self._at = 0
        self._wait = wait
        self._calm = 0
        self._failed = 0
        self._trying = False

    @property
    def home(self) -> str:
        """Precision in which the run was started."""
        return self._names[0]

    @property
    def current(self) -> str:
        """Precision currently in use."""
        return self._names[self._at]

    @property
    def has_lower_precision(self) -> bool:
        """Whether there are fallback precisions at all."""
        return len(self._names) > 1

    @property
    def next(self) -> str | None:
        """Next fallback precision; None at the last level."""
        return self._names[self._at + 1] if self._at + 1 < len(self._names) else None

    def down(self) -> str:
        """Falls back one level and returns it; counts as a failed retry if one is running."""
        assert self.next is not None, "no precision level is left"
        self._at += 1
        self._calm = 0
        if self._trying:
            self._trying = False
            self._failed += 1
            self._wait *= 2
        return self.current

    def disturbed(self) -> None:
        """Restarts the count of healthy steps, at an incident."""
        self._calm = 0

    def healthy(self) -> str | None:
        """Counts a healthy step; returns the precision to retry from the next step on, or None."""
        self._calm += 1
        if self._calm < self._wait:
            return None
        self._calm, self._trying = 0, False
        if self._at <= self._top or self._failed >= self._failures:
            return None
        self._at -= 1
        self._trying = True
        return self.current

    def state_dict(self) -> dict[str, Any]:
        """Returns the level, the counters and the precision names they belong to."""
        return {
            "names": list(self._names),
            "at": self._at,
            "wait": self._wait,
            "calm": self._calm,
            "failed": self._failed,
            "trying": self._trying,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Restores a state; returns False and ignores it if it has other precision names."""
        if tuple(state["names"]) != self._names:
            return False
        self._at, self._wait, self._calm = int(state["at"]), int(state["wait"]), int(state["calm"])
        self._failed, self._trying = int(state["failed"]), bool(state["trying"])
        return True
