"""What an optimizer step looks like, in floats: all that a detector sees.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientDetail:
    """Distribution of one parameter's unclipped gradient.

    The norm is exact; while a run is healthy the rest is from a sample of 4096 elements.
    """

    name: str
    norm: float
    mean: float
    std: float
    minimum: float
    maximum: float
    zero_share: float
    """Share of elements that are exactly 0, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class ProbeReading:
    """What a probe has measured: one number, of one place in the model."""

    quantity: str
    """Such as ``attention_logit``."""
    where: str
    """Module or parameter; "" for the whole model."""
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMoves:
    """How far each weight has moved from one scan to the next, in the order of ``weight_norms``."""

    since: int
    """Step of the scan before."""
    norms: tuple[float, ...]
    """Norms at that scan."""
    peaks: tuple[tuple[float, float], ...]
    """Largest absolute values, at that scan and now."""
    distances: tuple[float, ...]
    """Norms of the difference, from the sample and without its largest element, so that one torn
    element does not explain itself."""
    farthest: tuple[tuple[float, float], ...]
    """How far the element has moved that went farthest in the sample, and the second after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one optimizer step looks like before the update is applied.

    Gradients are measured accumulated, unscaled and unclipped. Norms are Euclidean. On several
    ranks the numbers are those of all of them together; the loss is their mean.
    """

    step: int
    """Optimizer steps taken before this one (Lightning's ``global_step``)."""
    loss: float
    """Loss of the step, averaged over the accumulation window; NaN when none was seen."""
    grad_norm: float
    """Norm of all gradients together."""
    optimizer: int = 0
    """Index of the optimizer in ``trainer.optimizers``."""
    loss_scale: float | None = None
    """Factor of the loss scaler, None where none is at work."""
    has_loss: bool = True
    """False where no backward pass was observed, so that ``loss`` means nothing."""
    names: tuple[str, ...] = ()
    """Parameters that have a gradient, in the order of ``grad_norms``."""
    grad_norms: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    """Effective learning rate of each parameter group: nominal times every active factor."""
    nominal_learning_rates: tuple[float, ...] = ()
    update_ratio: float | None = None
    """Norm of the *previous* update over that of the weights, from the sample; None at first."""
    update_learning_rate: float = 0.0
    """Largest effective learning rate of that previous update."""
    stuck_share: float | None = None
    """Share of sampled 16-bit weights that are what they were ten updates ago, of those whose
    gradient kept its sign, in [0, 1]; on one step in ten, and only where weights are 16-bit."""
    moment_ratio: float | None = None
    """Smallest ratio over parameters of Adam's sampled second moment to what decay alone leaves."""
    moment_name: str = ""
    """The parameter that has ``moment_ratio``."""
    moment_rms: float | None = None
    """Largest ratio over parameters of the gradient to what Adam's second moment expects, 1 where
    gradients keep their size; None before the second step, and for other optimizers."""
    moment_rms_name: str = ""
    """The parameter that has ``moment_rms``."""
    bad_momentum: tuple[str, ...] = ()
    """Parameters whose sampled momentum, or first moment, is non-finite."""
    weight_norm: float | None = None
    """Norm of all weights; only on the steps that scan them, else None."""
    weight_norms: tuple[tuple[str, float], ...] = field(default=(), repr=False)
    """Norm of each weight, by name; only on the steps that scan them."""
    weight_moves: WeightMoves | None = field(default=None, repr=False)
    """What the weights have done since the scan before; None where there is none to compare with,
    as after a rollback."""
    bad_weights: tuple[str, ...] = ()
    """Parameters found non-finite on a step that scans them."""
    rank_weights: tuple[float, ...] = field(default=(), repr=False)
    """Checksum of each rank's sampled weights; only where all ranks hold the same weights."""
    rank_rates: tuple[float, ...] = field(default=(), repr=False)
    """Sum of each rank's effective learning rates; only on several ranks."""
    details: tuple[GradientDetail, ...] = field(default=(), repr=False)
    """Per-parameter distributions; only on the steps that ask for them."""
    readings: tuple[ProbeReading, ...] = ()
    """What probes have measured, on the steps on which it is their turn; over several ranks, the
    mean of each."""

    @property
    def finite_gradients(self) -> bool:
        """Whether every gradient is finite."""
        return math.isfinite(self.grad_norm)

    def readings_of(self, quantity: str) -> list[ProbeReading]:
        """The readings of one quantity, largest first; NaN before all."""
        found = [r for r in self.readings if r.quantity == quantity]
        return sorted(found, key=lambda r: math.inf if math.isnan(r.value) else r.value)[::-1]

    def worst_layers(self, count: int = 5) -> list[tuple[str, float]]:
        """Parameters with the largest gradient norms, non-finite ones first."""
        pairs = list(zip(self.names, self.grad_norms, strict=True))
        pairs.sort(key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf, reverse=True)
        return pairs[:count]


def mean_readings(by_rank: Sequence[Sequence[ProbeReading]]) -> list[ProbeReading]:
    """The mean over ranks of each quantity at each place.

    >>> mean_readings([[ProbeReading("a", "x", 1.0)], [ProbeReading("a", "x", 3.0)]])
    [ProbeReading(quantity='a', where='x', value=2.0)]
    """
    values: dict[tuple[str, str], list[float]] = {}
    for readings in by_rank:
        for r in readings:
            values.setdefault((r.quantity, r.where), []).append(r.value)
    return [ProbeReading(*key, sum(each) / len(each)) for key, each in values.items()]
