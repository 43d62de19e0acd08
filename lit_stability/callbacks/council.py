"""What a `GradientMonitor` asks of its fellows on the other ranks, once a step looks bad.

The protocol is told in `lit_stability.ranks`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from lit_stability.detectors import Vote
from lit_stability.incidents import Incident
from lit_stability.ranks import Ranks, Summed


class Council:
    """Findings, votes and books of several ranks; on one rank, its own.

    Args:
        ranks: the ranks, None for one on its own.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        self._damaged = False
        self._votes: Summed | None = None

    @property
    def votes(self) -> bool:
        """Whether a step that looks good in the shared numbers is voted on."""
        return self._ranks is not None and self._ranks.overlapped

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a part of the weights only."""
        return self._ranks is not None and not self._ranks.replicas

    def audit(
        self, weights: Sequence[str], moments: Sequence[str], *, shared: bool
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What all ranks found together; of an incident that is not shared, nothing yet."""
        if self._ranks is None:
            return tuple(weights), tuple(moments)
        if not shared:
            self._damaged |= bool(weights or moments)
            return (), ()
        said = self._ranks.gather((tuple(weights), tuple(moments)))
        return _union(w for w, _ in said), _union(m for _, m in said)

    def open(self, incident: Incident, *, shared: bool) -> None:
        """Tell an incident how its findings are agreed upon."""
        if self._ranks is not None:
            how = self._agree if shared else self._put_aside
            incident.agree = functools.partial(how, incident)

    def _put_aside(self, incident: Incident, found: bool) -> bool:
        self._damaged |= found
        return False

    def _agree(self, incident: Incident, found: bool) -> bool:
        assert self._ranks is not None
        said = self._ranks.gather((found, incident.cause, list(incident.evidence)))
        everywhere = set.intersection(*(set(evidence) for _, _, evidence in said))
        # In the order of the ranks, so that the record is the same whoever writes it.
        incident.evidence = list(
            dict.fromkeys(
                line if line in everywhere else f"rank {rank}: {line}"
                for rank, (_, _, evidence) in enumerate(said)
                for line in evidence
            )
        )
        incident.cause = next((cause for _, cause, _ in said if cause), "")
        return any(each for each, _, _ in said)

    def vote(self, *, objected: bool, grad_norm: float) -> None:
        """Send this rank's vote on the step."""
        assert self._ranks is not None
        self._votes = self._ranks.vote(Vote(objected, grad_norm, self._damaged).row())
        self._damaged = False

    def count(self) -> list[Vote]:
        """The votes of all ranks on the step."""
        assert self._votes is not None
        votes, self._votes = self._votes, None
        _, rows = votes.split(votes.wait().tolist())
        return [Vote.from_row(row) for row in rows]

    def adopt_books(self, owners: Iterable[Any]) -> None:
        """Give everybody who keeps books those of rank 0: what is spent, and what is in force."""
        assert self._ranks is not None
        keepers = [owner for owner in owners if hasattr(owner, "load_books")]
        adopted = self._ranks.from_first([keeper.books() for keeper in keepers])
        for keeper, books in zip(keepers, adopted, strict=True):
            keeper.load_books(books)

    def close(self) -> None:
        """Part."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def _union(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))
