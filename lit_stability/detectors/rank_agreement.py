"""Whether the ranks of a run agree: on their learning rates, their weights, and on a step.

All of it from numbers that every rank has alike, so that they also agree that they disagree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lit_stability.detectors.anomaly import Anomaly
from lit_stability.measurement.step_stats import StepStats

KIND = "rank disagreement"
_SAME_NORM = 1e-3
"""Relative difference of gradient norms that the order of additions may explain."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What one rank made of a step's gradients: whether it objected, and the norm that it saw.

    All ranks exchange theirs, see `disagreement`.
    """

    objected: bool
    grad_norm: float
    told: bool = False
    """Whether it has something to tell of a step that it takes."""

    def row(self) -> tuple[float, float, float]:
        """As numbers; see `from_row`."""
        return float(self.objected), self.grad_norm, float(self.told)

    @classmethod
    def from_row(cls, row: Sequence[float]) -> Vote:
        """From the numbers of `row`."""
        return cls(bool(row[0]), row[1], bool(row[2]))


def disagreement(stats: StepStats, votes: Sequence[Vote]) -> Anomaly | None:
    """Objects to a step that some ranks took and others did not, or took with other gradients.

    Args:
        stats: of the step, on this rank.
        votes: of all ranks, in their order.

    >>> step = StepStats(step=7, loss=1.0, grad_norm=1.0)
    >>> disagreement(step, [Vote(False, 1.0), Vote(True, 900.0)]).message
    'rank 1 objects to its gradients, the others do not; gradient norms by rank: 1, 900'
    """
    norms = [v.grad_norm for v in votes]
    objecting = [r for r, v in enumerate(votes) if v.objected]
    if 0 < len(objecting) < len(votes):
        verb = "objects to its" if len(objecting) == 1 else "object to their"
        seen = f"{_ranks(objecting)} {verb} gradients, the others do not"
    elif not all(_same(norms[0], n) for n in norms):
        seen = "the ranks' averaged gradients differ"
    else:
        return None
    return _anomaly(stats, "grad_norm", f"{seen}; gradient norms by rank: {_list(norms)}", norms)


def rates_differ(stats: StepStats) -> Anomaly | None:
    """Objects to ranks that are about to step with different learning rates.

    Args:
        stats: of a step, with ``rank_rates``.
    """
    if len(set(stats.rank_rates)) < 2:
        return None
    message = f"the ranks' learning rates differ, by rank: {_list(stats.rank_rates)}"
    return _anomaly(stats, "learning_rate", message, stats.rank_rates)


class Replicas:
    """Objects to ranks whose weights were the same and no longer are.

    Weights that were not the same for ``trust`` steps from the start on, as where a layer is
    meant to be each rank's own, are not compared any more; ``given_up`` tells.

    Args:
        trust: steps of equal weights after which a difference is damage.
    """

    def __init__(self, trust: int = 3) -> None:
        self.trust = trust
        self.equal = 0
        self.given_up = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """See the class."""
        if self.given_up or not stats.rank_weights:
            return None
        if len(set(stats.rank_weights)) == 1:
            self.equal += 1
            return None
        if self.equal < self.trust:
            self.given_up = True
            return None
        return _weights_differ(stats)

    def explain(self, anomaly: Anomaly, stats: StepStats) -> Anomaly:
        """The anomaly, with state that is bad where the weights turn out to differ as well."""
        apart = self.check(stats)
        if apart is None:
            return anomaly
        message = f"{anomaly.message}; {apart.message}"
        return replace(anomaly, message=message, state_corrupted=True, warn_only=False)


def _anomaly(stats: StepStats, signal: str, message: str, values: Sequence[float]) -> Anomaly:
    return Anomaly(
        kind=KIND,
        step=stats.step,
        value=max(values, key=lambda x: math.inf if math.isnan(x) else x),
        signal=signal,
        optimizer=stats.optimizer,
        state_corrupted=True,
        layers=tuple((f"rank {r}", v) for r, v in enumerate(values))[:5],
        message=message,
    )


def _same(a: float, b: float) -> bool:
    if math.isfinite(a) and math.isfinite(b):
        return math.isclose(a, b, rel_tol=_SAME_NORM)
    return math.isfinite(a) == math.isfinite(b)


def _weights_differ(stats: StepStats) -> Anomaly:
    sums = stats.rank_weights
    ((usual, count),) = Counter(sums).most_common(1)
    differing = [r for r, v in enumerate(sums) if v != usual]
    if 2 * count > len(sums):
        seen = f"the weights of {_ranks(differing)} are no longer those of the others"
    else:
        seen = "the ranks' weights are no longer the same"
    message = f"{seen}; checksums by rank: {', '.join(f'{v:.0f}' for v in sums[:8])}"
    return replace(_anomaly(stats, "weights", message, sums), since=max(0, stats.step - 1))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _list(values: Sequence[float]) -> str:
    shown = [f"{v:.4g}" for v in values[:8]]
    return ", ".join([*shown, "..."] if len(values) > 8 else shown)
