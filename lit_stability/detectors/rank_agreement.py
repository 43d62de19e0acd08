"""Checks that the ranks of a run agree on learning rates, weights and the verdict on a step.

All checks use numbers that are the same on every rank, so every rank gets the same result.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lit_stability.detectors.anomaly import Anomaly
from lit_stability.measurement.step_stats import StepStats

KIND = "rank disagreement"
_SAME_NORM = 1e-3
"""Relative difference of gradient norms that the order of additions can explain."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One rank's verdict on a step's gradients; the ranks exchange theirs, see `disagreement`."""

    objected: bool
    """Whether the rank rejects the step."""
    grad_norm: float
    """Norm of the gradients on the rank."""
    warned: bool = False
    """Whether the rank accepts the step and warns about it."""

    def row(self) -> tuple[float, float, float]:
        """Returns the vote as numbers, the reverse of `from_row`."""
        return float(self.objected), self.grad_norm, float(self.warned)

    @classmethod
    def from_row(cls, row: Sequence[float]) -> "Vote":
        """Makes a vote from the numbers that `row` returned."""
        return cls(bool(row[0]), row[1], bool(row[2]))


def disagreement(stats: StepStats, votes: Sequence[Vote]) -> Anomaly | None:
    """Returns an anomaly if only some ranks reject a step, or if their gradient norms differ.

    Args:
        stats: of the step, on this rank.
        votes: of all ranks, in rank order.

    >>> step = StepStats(step=7, loss=1.0, grad_norm=1.0)
    >>> disagreement(step, [Vote(False, 1.0), Vote(True, 900.0)]).message
    'rank 1 rejects its gradients, the others do not; gradient norms by rank: 1, 900'
    """
    norms = [v.grad_norm for v in votes]
    rejecting = [r for r, v in enumerate(votes) if v.objected]
    if 0 < len(rejecting) < len(votes):
        verb = "rejects its" if len(rejecting) == 1 else "reject their"
        text = f"{_ranks(rejecting)} {verb} gradients, the others do not"
    elif not all(_same(norms[0], n) for n in norms):
        text = "the ranks' averaged gradients differ"
    else:
        return None
    return _anomaly(stats, "grad_norm", f"{text}; gradient norms by rank: {_list(norms)}", norms)


def rates_differ(stats: StepStats) -> Anomaly | None:
    """Returns an anomaly if the ranks are about to step with different learning rates.

    Args:
        stats: of a step; uses ``rank_rates``.
    """
    if len(set(stats.rank_rates)) < 2:
        return None
    message = f"the ranks' learning rates differ, by rank: {_list(stats.rank_rates)}"
    return _anomaly(stats, "learning_rate", message, stats.rank_rates)


class Replicas:
    """Flags ranks whose weights were the same and no longer are.

    Weights that differ before they were equal for ``trust`` steps are not compared again, as a
    layer may be meant to differ between ranks; ``given_up`` is True then.

    Args:
        trust: steps with equal weights after which a difference counts as damage.
    """

    def __init__(self, trust: int = 3) -> None:
        self.trust = trust
        self.equal = 0
        self.given_up = False

    def check(self, stats: StepStats) -> Anomaly | None:
        """Returns an anomaly if the weights were equal for long enough and now differ."""
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
        """Returns the anomaly, marked as damaged state if the ranks' weights differ as well."""
        difference = self.check(stats)
        if difference is None:
            return anomaly
        message = f"{anomaly.message}; {difference.message}"
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
        text = f"the weights of {_ranks(differing)} differ from those of the others"
    else:
        text = "the ranks' weights are no longer the same"
    message = f"{text}; checksums by rank: {', '.join(f'{v:.0f}' for v in sums[:8])}"
    return replace(_anomaly(stats, "weights", message, sums), since=max(0, stats.step - 1))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _list(values: Sequence[float]) -> str:
    shown = [f"{v:.4g}" for v in values[:8]]
    return ", ".join([*shown, "..."] if len(values) > 8 else shown)
