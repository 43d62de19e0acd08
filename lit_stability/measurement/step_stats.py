"""The statistics of an optimizer step, as floats: the input of every detector.

Imports neither torch nor Lightning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientDetail:
    """Distribution of one parameter's unclipped gradient.

    The norm is exact. The other values are from a sample of 4096 elements while a run is healthy.
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
    """One number that a probe has measured at one place in the model."""

    quantity: str
    """Name of the quantity, such as ``attention_logit``."""
    where: str
    """Name of the module or parameter; "" for the whole model."""
    value: float
    largest: bool = False
    """Whether the value of several ranks is the largest and not the mean."""
    logged: bool = True
    """Whether loggers get it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMoves:
    """How far each weight moved from one scan to the next, in the order of ``weight_norms``."""

    since: int
    """Step of the earlier scan."""
    norms: tuple[float, ...]
    """Norms at that scan."""
    peaks: tuple[tuple[float, float], ...]
    """Largest absolute value of each weight, at that scan and now."""
    distances: tuple[float, ...]
    """Norms of the difference, from the sample without its largest element, so that a corrupted
    element does not explain its own change."""
    farthest: tuple[tuple[float, float], ...]
    """Largest and second largest move of an element in the sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """Statistics of one optimizer step before the update is applied.

    Gradients are measured accumulated, unscaled and unclipped. Norms are Euclidean. With several
    ranks the numbers are global; the loss is the mean over the ranks.

    >>> stats = StepStats(step=3, loss=2.5, grad_norm=0.7)
    >>> stats.step, stats.has_loss
    (3, True)
    """

    step: int
    """Optimizer steps taken before this one (Lightning's ``global_step``)."""
    loss: float
    """Loss of the step, averaged over the accumulation window; NaN if there was none."""
    grad_norm: float
    """Norm of all gradients together."""
    optimizer: int = 0
    """Index of the optimizer in ``trainer.optimizers``."""
    loss_scale: float | None = None
    """Factor of the loss scaler, None without a scaler."""
    has_loss: bool = True
    """Whether a backward pass was observed; if not, ``loss`` has no meaning."""
    names: tuple[str, ...] = ()
    """Parameters that have a gradient, in the order of ``grad_norms``."""
    grad_norms: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    """Effective learning rate of each parameter group: nominal times every active factor."""
    nominal_learning_rates: tuple[float, ...] = ()
    update_ratio: float | None = None
    """Norm of the *previous* update over that of the weights, from the sample; None if unknown."""
    update_learning_rate: float = 0.0
    """Largest effective learning rate of that previous update."""
    update_nominal_learning_rate: float = 0.0
    """Largest learning rate that a scheduler set for that update, without our own cuts."""
    outside_writes: tuple[tuple[str, float], ...] = ()
    """Parameters whose sample changed after the previous update ended, and by what share of their
    norm; only in the first step of an epoch, and while the meter watches for such writes."""
    starts_epoch: bool = False
    """Whether an epoch has ended between the previous update and this step."""
    clip_norm: float | None = None
    """Norm to which the Trainer clips the gradients of this step; None if it does not."""
    stuck_share: float | None = None
    """Share, in [0, 1], of sampled 16-bit weights that have not changed in ten updates, among those
    whose gradient kept its sign; only with 16-bit weights, and on one step in ten."""
    moment_ratio: float | None = None
    """Smallest ratio, over parameters, of Adam's sampled second moment to what decay leaves."""
    moment_name: str = ""
    """The parameter with ``moment_ratio``."""
    moment_growth: float | None = None
    """Largest ratio, over parameters, of Adam's sampled second moment to its upper bound, from the
    decay and the last gradient; at most 1 unless it was changed from outside."""
    moment_growth_name: str = ""
    """The parameter with ``moment_growth``."""
    moment_rms: float | None = None
    """Largest ratio, over parameters, of the gradient to what Adam's second moment expects; 1 if
    gradients keep their size, None before the second step and for other optimizers."""
    moment_rms_name: str = ""
    """The parameter with ``moment_rms``."""
    bad_momentum: tuple[str, ...] = ()
    """Parameters whose sampled momentum, or first moment, is non-finite."""
    weight_norm: float | None = None
    """Norm of all weights; None on steps that do not scan the weights."""
    weight_norms: tuple[tuple[str, float], ...] = field(default=(), repr=False)
    """Name and norm of each weight; empty on steps that do not scan the weights."""
    weight_moves: WeightMoves | None = field(default=None, repr=False)
    """Moves of the weights since the last scan; None if there is none to compare with, as after a
    rollback."""
    bad_weights: tuple[str, ...] = ()
    """Non-finite parameters; only on steps that scan the weights."""
    bad_buffers: tuple[str, ...] = ()
    """Buffers of the module that were finite and are damaged now, see `WatchedBuffers`; only on
    steps that scan."""
    last_scan: int | None = None
    """Step of the scan before this one, -1 if there was none; None if the state was good until this
    step, as right after a rollback."""
    rank_weights: tuple[float, ...] = field(default=(), repr=False)
    """Checksum of each rank's sampled weights; only if all ranks hold the same weights."""
    rank_rates: tuple[float, ...] = field(default=(), repr=False)
    """Sum of each rank's effective learning rates; only with several ranks."""
    rank_flags: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """Flags of each rank, one for each callback that has any, see `StabilityCallback.rank_flag`."""
    raised_on: tuple[int, ...] = ()
    """Ranks whose ``training_step`` raised in this step, so that loss and gradients are not those
    of all batches; only with several ranks."""
    details: tuple[GradientDetail, ...] = field(default=(), repr=False)
    """Distribution per parameter; only on steps that request it."""
    readings: tuple[ProbeReading, ...] = ()
    """Readings of the probes that ran on this step; with several ranks, the mean of each, or
    the largest."""

    @property
    def finite_gradients(self) -> bool:
        """Whether every gradient is finite."""
        return math.isfinite(self.grad_norm)

    @property
    def share_of_schedule(self) -> float:
        """The learning rate in force as a share of the scheduled one; the largest of any group.

        >>> rates = {"learning_rates": (1e-3, 0.0), "nominal_learning_rates": (1e-2, 0.0)}
        >>> StepStats(step=0, loss=1.0, grad_norm=1.0, **rates).share_of_schedule
        0.1
        """
        pairs = zip(self.learning_rates, self.nominal_learning_rates, strict=False)
        return max((rate / nominal for rate, nominal in pairs if nominal > 0), default=1.0)

    def readings_of(self, quantity: str) -> list[ProbeReading]:
        """Returns the readings of one quantity, largest first, with NaN before all others."""
        matching = [r for r in self.readings if r.quantity == quantity]
        return sorted(matching, key=lambda r: math.inf if math.isnan(r.value) else r.value)[::-1]

    def worst_layers(self, count: int = 5) -> list[tuple[str, float]]:
        """Returns the parameters with the largest gradient norms, non-finite ones first."""
        pairs = list(zip(self.names, self.grad_norms, strict=True))
        pairs.sort(key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf, reverse=True)
        return pairs[:count]


def merged_readings(by_rank: Sequence[Sequence[ProbeReading]]) -> list[ProbeReading]:
    """Returns each quantity at each place as the mean over the ranks, or as the largest.

    >>> merged_readings([[ProbeReading("a", "x", 1.0)], [ProbeReading("a", "x", 3.0)]])[0].value
    2.0
    """
    found: dict[tuple[str, str], list[ProbeReading]] = {}
    for readings in by_rank:
        for r in readings:
            found.setdefault((r.quantity, r.where), []).append(r)
    return [replace(own[0], value=_merged(own)) for own in found.values()]


def _merged(readings: Sequence[ProbeReading]) -> float:
    values = [r.value for r in readings]
    if readings[0].largest:
        return max(values, key=lambda x: math.inf if math.isnan(x) else x)
    return sum(values) / len(values)
