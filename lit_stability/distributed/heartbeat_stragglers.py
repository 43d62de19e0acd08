"""Finds the rank that the others wait for, from the seconds that each spends in each phase.

Ranks that train together take the same time for a step. They differ in how much of it is their own
work, and how much they wait for others. Imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from lit_stability.distributed.heartbeat import BACKWARD, DATA, FORWARD, OPTIMIZER, Beat

WINDOWS = 4
"""Windows in a row in which the same rank must be slow: one long pause is in one window only."""

LEAST_EXCESS = 0.002
"""Seconds per batch below which nobody waits noticeably."""


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others."""

    rank: int
    phase: str
    """``data`` or ``forward``: where it is slow."""
    own: float
    """Seconds per batch that it spends there."""
    others: float
    """The median of the other ranks, in seconds per batch."""
    factor: float
    """How many times longer a batch takes because of it."""


class StragglerWatch:
    """Compares the own work of ranks over windows of batches.

    A batch takes T seconds on all ranks. If a rank spends e seconds more than the median of the
    others before the ranks first wait for each other, the others wait for it that long, and without
    it a batch would take T - e. The rank is slow if T / (T - e) is at least the factor.

    Not seen are a slow backward pass or optimizer, because ranks also wait in these, and a slow
    device that runs behind its host, because the host waits for it later in the step.

    Args:
        factor: from which on a rank is slow.
        batches: for how many batches it must be slow.
        forward_waits: whether ranks wait for each other in the forward pass too, as with sharded
            weights; only the data can then be slow.
    """

    def __init__(self, factor: float, batches: int, *, forward_waits: bool = False) -> None:
        self.factor, self.batches, self.forward_waits = factor, batches, forward_waits
        self._from: dict[int, Beat] = {}
        self._row: list[Straggler] = []
        self._reported: set[int] = set()

    def update(self, beats: Mapping[int, Beat]) -> Straggler | None:
        """Takes in what the ranks have published; returns a rank to report now.

        Args:
            beats: the latest of each rank.
        """
        if not all(each.totals for each in beats.values()):
            return None
        if not self._from:
            self._from = dict(beats)
        begun = min(beats[rank].batches - each.batches for rank, each in self._from.items())
        if begun < max(1, self.batches // WINDOWS):
            return None
        spent = {rank: _per_batch(self._from[rank], beat) for rank, beat in beats.items()}
        self._from = dict(beats)
        return self._judge(spent)

    def _judge(self, spent: Mapping[int, list[float]]) -> Straggler | None:
        slowest = max((self._compare(rank, spent) for rank in spent), key=lambda each: each.factor)
        if slowest.factor < self.factor:
            self._row.clear()
            return None
        if self._row and self._row[-1].rank != slowest.rank:
            self._row.clear()
        self._row.append(slowest)
        if len(self._row) < WINDOWS or slowest.rank in self._reported:
            return None
        self._reported.add(slowest.rank)
        return slowest

    def _compare(self, rank: int, spent: Mapping[int, list[float]]) -> Straggler:
        def excess(phase: int) -> float:
            return spent[rank][phase] - median(s[phase] for r, s in spent.items() if r != rank)

        late = {DATA: excess(DATA)}
        if not self.forward_waits:
            late[FORWARD] = excess(FORWARD)
        # A rank that waits for others in its forward pass is early there, not fast.
        total = max(late[DATA], sum(late.values()))
        batch = median(map(sum, spent.values()))
        phase = max(late, key=lambda each: late[each])
        own = spent[rank][phase]
        slow = total >= LEAST_EXCESS
        factor = batch / max(batch - total, 1e-9) if slow else 1.0
        name = {DATA: "data", FORWARD: "forward"}[phase]
        return Straggler(rank, name, own, own - late[phase], factor)


def _per_batch(before: Beat, after: Beat) -> list[float]:
    """Seconds per batch in each phase of a step; 0 in the others."""
    batches = after.batches - before.batches
    step = (DATA, FORWARD, BACKWARD, OPTIMIZER)
    return [
        (now - then) / batches if phase in step else 0.0
        for phase, (then, now) in enumerate(zip(before.totals, after.totals, strict=True))
    ]
