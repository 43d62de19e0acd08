"""Counts audits and findings by rank and host. Imports neither torch nor Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUDITS, WRONG, RERUN = "audits", "wrong", "wrong reruns"


class Ledger:
    """How often each rank was audited and found wrong; never rewound, and kept in checkpoints.

    >>> ledger = Ledger()
    >>> ledger.count("rank 0 on host-a (cpu)", AUDITS)
    1
    >>> ledger.count("rank 1 on host-b (cpu)", WRONG)
    1
    >>> ledger.suspects()
    [('rank 1 on host-b (cpu)', 1)]
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        """Place -> what -> how often."""

    def count(self, place: str, what: str) -> int:
        """Adds one, and returns how often it happened at this place."""
        own = self.counts.setdefault(place, {})
        own[what] = own.get(what, 0) + 1
        return own[what]

    def withdraw(self, place: str, what: str) -> None:
        """Takes one back that was no fault of the place."""
        self.counts[place][what] -= 1

    def suspects(self) -> list[tuple[str, int]]:
        """Returns the places with findings, wrong reruns included, the most frequent first."""
        found = {place: own.get(WRONG, 0) + own.get(RERUN, 0) for place, own in self.counts.items()}
        return sorted(((p, n) for p, n in found.items() if n), key=lambda pair: -pair[1])

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts."""
        return {place: dict(own) for place, own in self.counts.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Restores the counts."""
        self.counts = {str(p): {str(k): int(n) for k, n in own.items()} for p, own in state.items()}
