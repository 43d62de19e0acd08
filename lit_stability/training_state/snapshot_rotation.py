"""Decides which snapshot a rollback restores: one that enough healthy steps have confirmed.

Pure logic on plain data; imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass
class SnapshotRotation(Generic[S]):
    """Rotates two snapshots: the confirmed one for rollbacks, and an unconfirmed candidate.

    While there is no candidate, the previously confirmed snapshot is still available as ``older``.

    Args:
        make: builds an empty snapshot; called twice.
        confirm_after: number of healthy steps after which a candidate is confirmed.

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
    single: bool = False
    """Keeps one snapshot: the next capture replaces it, and must be confirmed at once."""
    confirmed: S | None = None
    older: S | None = None
    candidate: S | None = None
    _age: int = field(default=0, init=False)
    _spare: S | None = field(default=None, init=False)

    @property
    def ready(self) -> bool:
        """Returns whether no candidate is waiting for confirmation."""
        return self.candidate is None

    @property
    def oldest(self) -> S | None:
        """Returns the oldest confirmed snapshot."""
        return self.confirmed if self.older is None else self.older

    @property
    def all(self) -> list[S]:
        """Returns all snapshots that take memory, in no particular order."""
        held = (self.confirmed, self.older, self.candidate, self._spare)
        return [snapshot for snapshot in held if snapshot is not None]

    def begin(self) -> S:
        """Returns the snapshot to capture into; it replaces a candidate not yet confirmed."""
        if self.single and self.candidate is None:
            self.older = self.older or self.confirmed
            self._spare, self.confirmed = None, None
        if self.candidate is None:
            for snapshot in (self._spare, self.older):
                if snapshot is not None:
                    self.candidate = snapshot
                    break
            else:
                self.candidate = self.make()
            self._spare = self.older = None
        self._age = 0
        return self.candidate

    @property
    def is_about_to_confirm(self) -> bool:
        """Returns whether the next healthy step confirms the candidate."""
        return self.candidate is not None and self._age + 1 >= self.confirm_after

    def healthy(self) -> None:
        """Counts a healthy step towards the confirmation of the candidate."""
        self._age += 1
        if self.candidate is not None and self._age >= self.confirm_after:
            self.confirm_now()

    def confirm_now(self) -> None:
        """Confirms the candidate immediately, as at the start of a fit."""
        if self.candidate is not None:
            self.older, self.confirmed = self.confirmed, self.candidate
            self.candidate = None

    def discard(self) -> None:
        """Drops the candidate, because an anomaly occurred before its confirmation."""
        if self.candidate is not None:
            self._spare, self.candidate = self.candidate, None

    def go_back(self) -> None:
        """Makes the older snapshot the confirmed one: the newer was captured too late."""
        if self.older is not None:
            self._spare, self.confirmed, self.older = self.confirmed, self.older, None

    def restart(self) -> None:
        """Drops all snapshots, as before the first capture; buffers are reused."""
        self.discard()
        self._spare = self._spare or self.confirmed
        self.confirmed = self.older = None
