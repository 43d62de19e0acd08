"""What the `GradientMonitor` of each rank exchanges with those of the other ranks.

`lit_stability.distributed.collectives` describes the protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lit_stability.callbacks.hooks import implements
from lit_stability.detectors import Vote
from lit_stability.distributed.collectives import Ranks, Summed
from lit_stability.measurement.step_meter import StepMeter


class RankConsensus:
    """Findings, votes and state of several ranks; on one rank, its own.

    Args:
        ranks: the ranks; None for a single one.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self._votes: Summed | None = None

    @property
    def votes(self) -> bool:
        """Whether the ranks vote on a step that looks healthy in the shared numbers."""
        return self._ranks is not None and self._ranks.overlapped

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of the weights."""
        return self._ranks is not None and not self._ranks.replicas

    def gather(self, value: Any) -> list[Any]:
        """Returns the value of each rank; all ranks must call it, or none."""
        return [value] if self._ranks is None else self._ranks.gather(value)

    def audit(
        self, weights: Sequence[str], moments: Sequence[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the names that any rank found non-finite; all ranks must call it, or none."""
        found = self.gather((tuple(weights), tuple(moments)))
        return _union(w for w, _ in found), _union(m for _, m in found)

    def bad_state(self, meters: Iterable[StepMeter]) -> tuple[str, ...]:
        """Returns the names of non-finite weights and buffers, of all ranks if they are sharded."""
        bad = tuple(name for meter in meters for name in meter.bad_state())
        return self.audit(bad, ())[0] if self.sharded else bad

    def vote(self, vote: Vote) -> None:
        """Sends the vote of this rank on the step."""
        assert self._ranks is not None
        self._votes = self._ranks.vote(vote.row())

    def count(self) -> list[Vote]:
        """Returns the votes of all ranks on the step."""
        assert self._votes is not None
        votes, self._votes = self._votes, None
        _, rows = votes.split(votes.wait().tolist())
        return [Vote.from_row(row) for row in rows]

    def sync_from_rank_0(self, callbacks: Iterable[Any]) -> None:
        """Gives every callback the state of rank 0: what is spent, and what is in force."""
        assert self._ranks is not None
        owners = [each for each in callbacks if implements(each, "load_consensus_state")]
        states = self._ranks.from_first([owner.consensus_state() for owner in owners])
        for owner, state in zip(owners, states, strict=True):
            owner.load_consensus_state(state)

    def close(self) -> None:
        """Destroys the process group."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def _union(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
