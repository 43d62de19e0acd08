"""Which precision a run is in: down when numbers overflow, and up again after a calm while.

Data in, data out: no torch, no Lightning. Monotone state: a rollback never rewinds it, a checkpoint
carries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PRECISIONS = ("16-true", "bf16-true", "16-mixed", "bf16-mixed", "32-true")
"""Lightning's names, those that keep fewer numbers first."""


def lower_precisions(precision: str) -> tuple[str, ...]:
    """Where a run falls back to from a precision, by default.

    >>> lower_precisions("16-mixed"), lower_precisions("bf16-true"), lower_precisions("32-true")
    (('bf16-mixed', '32-true'), ('bf16-mixed', '32-true'), ())
    """
    wanted = ("bf16-mixed", "32-true")
    return tuple(r for r in wanted if precision in PRECISIONS and is_below(r, precision))


def is_below(level: str, precision: str) -> bool:
    """Whether one precision is further down than another."""
    return PRECISIONS.index(level) > PRECISIONS.index(precision)


class PrecisionPolicy:
    """Goes down a rung at a time, and tries the one above again after ``wait`` healthy steps.

    A try that fails, within as many steps, doubles the wait; after ``failures`` of them the ladder
    stays down. It never goes back to half-precision weights: what they rounded away is lost. So at
    most ``levels + failures`` changes go down, however the run behaves.

    Args:
        home: the precision that the run was started in.
        levels: those below it, in order.
        wait: healthy steps before the faster precision is tried again.
        failures: tries that may fail.

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
        """The precision that the run was started in."""
        return self._names[0]

    @property
    def current(self) -> str:
        """The precision in force."""
        return self._names[self._at]

    @property
    def has_lower_precision(self) -> bool:
        """Whether there is anything to fall back to, from wherever it is."""
        return len(self._names) > 1

    @property
    def next(self) -> str | None:
        """The rung below, or None."""
        return self._names[self._at + 1] if self._at + 1 < len(self._names) else None

    def down(self) -> str:
        """Go down a rung; it counts as a failure while the rung above is being tried again."""
        assert self.next is not None, "no rung is left"
        self._at += 1
        self._calm = 0
        if self._trying:
            self._trying = False
            self._failed += 1
            self._wait *= 2
        return self.current

    def disturbed(self) -> None:
        """An incident: the calm begins anew."""
        self._calm = 0

    def healthy(self) -> str | None:
        """Count a healthy step; the precision to try again with the next one, or None."""
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
        """Where it is and what it has cost, with the names it belongs to."""
        return {
            "names": list(self._names),
            "at": self._at,
            "wait": self._wait,
            "calm": self._calm,
            "failed": self._failed,
            "trying": self._trying,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Put such a state back; False for one of another run, that is left alone."""
        if tuple(state["names"]) != self._names:
            return False
        self._at, self._wait, self._calm = int(state["at"]), int(state["wait"]), int(state["calm"])
        self._failed, self._trying = int(state["failed"]), bool(state["trying"])
        return True
