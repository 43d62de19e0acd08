"""What a `GradientMonitor` and its fellows on the other ranks say to each other.

The protocol is told in `lit_stability.distributed.collectives`.
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
        ranks: the ranks, None for one on its own.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self._votes: Summed | None = None

    @property
    def votes(self) -> bool:
        """Whether a step that looks good in the shared numbers is voted on."""
        return self._ranks is not None and self._ranks.overlapped

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a part of the weights only."""
        return self._ranks is not None and not self._ranks.replicas

    def gather(self, said: Any) -> list[Any]:
        """What each rank says; to be called by all of them or none."""
        return [said] if self._ranks is None else self._ranks.gather(said)

    def audit(
        self, weights: Sequence[str], moments: Sequence[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names that any rank found something bad in; to be called by all of them or none."""
        said = self.gather((tuple(weights), tuple(moments)))
        return _union(w for w, _ in said), _union(m for _, m in said)

    def bad_weights(self, meters: Iterable[StepMeter]) -> tuple[str, ...]:
        """Names of non-finite weights, of all ranks where each holds a part of them."""
        bad = tuple(name for meter in meters for name in meter.bad_weights())
        return self.audit(bad, ())[0] if self.sharded else bad

    def vote(self, vote: Vote) -> None:
        """Send this rank's vote on the step."""
        assert self._ranks is not None
        self._votes = self._ranks.vote(vote.row())

    def count(self) -> list[Vote]:
        """The votes of all ranks on the step."""
        assert self._votes is not None
        votes, self._votes = self._votes, None
        _, rows = votes.split(votes.wait().tolist())
        return [Vote.from_row(row) for row in rows]

    def sync_from_rank_0(self, callbacks: Iterable[Any]) -> None:
        """Give every callback the state of rank 0: what is spent, and what is in force."""
        assert self._ranks is not None
        owners = [each for each in callbacks if implements(each, "load_consensus_state")]
        states = self._ranks.from_first([owner.consensus_state() for owner in owners])
        for owner, state in zip(owners, states, strict=True):
            owner.load_consensus_state(state)

    def close(self) -> None:
        """Part."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def _union(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
