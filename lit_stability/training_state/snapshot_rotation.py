"""Which snapshot may be gone back to: a candidate until enough healthy steps have confirmed it.

Data in, data out: no torch, no Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass
class SnapshotRotation(Generic[S]):
    """Two snapshots in turn: the confirmed one to go back to, and a candidate on probation.

    While no candidate waits, the one confirmed before is still there, as ``older``.

    Args:
        make: builds an empty snapshot; called twice.
        confirm_after: healthy steps after which a candidate is confirmed.

    >>> g = SnapshotRotation(make=list, confirm_after=2)
    >>> g.begin().append("a"); g.confirm_now()
    >>> g.begin().append("b")
    >>> g.healthy(); g.confirmed
    ['a']
    >>> g.healthy(); g.confirmed, g.older
    (['b'], ['a'])
    """

    make: Callable[[], S]
    confirm_after: int
    confirmed: S | None = None
    older: S | None = None
    candidate: S | None = None
    _age: int = field(default=0, init=False)
    _spare: S | None = field(default=None, init=False)

    @property
    def ready(self) -> bool:
        """Whether no candidate is waiting for its confirmation."""
        return self.candidate is None

    @property
    def oldest(self) -> S | None:
        """The snapshot furthest back."""
        return self.confirmed if self.older is None else self.older

    def begin(self) -> S:
        """The snapshot to capture into; a candidate that was still waiting is given up for it."""
        if self.candidate is None:
            for each in (self._spare, self.older):
                if each is not None:
                    self.candidate = each
                    break
            else:
                self.candidate = self.make()
            self._spare = self.older = None
        self._age = 0
        return self.candidate

    def healthy(self) -> None:
        """Count a healthy step towards the candidate's confirmation."""
        self._age += 1
        if self.candidate is not None and self._age >= self.confirm_after:
            self.confirm_now()

    def confirm_now(self) -> None:
        """Trust the candidate as it is, as at the start of a fit."""
        if self.candidate is not None:
            self.older, self.confirmed = self.confirmed, self.candidate
            self.candidate = None

    def discard(self) -> None:
        """Drop the candidate: something went wrong while it waited."""
        if self.candidate is not None:
            self._spare, self.candidate = self.candidate, None

    def go_back(self) -> None:
        """Trust the older one alone: the one confirmed after it was too late."""
        if self.older is not None:
            self._spare, self.confirmed, self.older = self.confirmed, self.older, None

    def restart(self) -> None:
        """Begin as at first, with a snapshot that is yet to be taken."""
        self.discard()
        self._spare = self._spare or self.confirmed
        self.confirmed = self.older = None
