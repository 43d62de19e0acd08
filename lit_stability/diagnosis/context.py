"""The diagnosis context: everything that evidence rules can use.

Data in, data out: imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from lit_stability.detectors import Anomaly
from lit_stability.diagnosis.loss_pattern import LossPattern, loss_pattern
from lit_stability.diagnosis.training_phases import Phase, PhaseRange
from lit_stability.measurement.step_stats import StepStats

EARLY = 1000
"""Optimizer steps during which initialisation and warm-up are checked first."""
LARGE = 10.0
"""Ratio to its median above which a gradient norm counts as large."""
STEEP = 1000.0
"""Sensitivity of the loss above which 0.1 % of the weights changes it by as much as itself."""
STALE = 2.3
"""Root mean square of gradients relative to Adam's second moment; larger values precede loss spikes
(Wortsman et al. 2023, arXiv 2304.13013)."""


@dataclass(frozen=True, kw_only=True)
class DiagnosisContext:
    """An anomaly, the steps before it and the configuration of the run.

    Only the anomaly is required; what is not known is evidence neither for nor against a cause.
    """

    anomaly: Anomaly
    history: tuple[StepStats, ...] = field(default=(), repr=False)
    """Accepted steps before it, the oldest first, about a hundred."""
    stats: StepStats | None = field(default=None, repr=False)
    """The measurement of the bad step."""
    occurrences: int = 1
    """Anomalies of the same incident so far; a batch that is retried counts twice."""
    clipped: int = 0
    """How many of them were clipped."""
    origin: Any = None
    """Operation that made the first NaN or Inf, a `NonFiniteOrigin`; None if not known."""
    verdict: str = ""
    """"transient" or "deterministic" once the step was run again, else empty; see `Incident`."""
    rerun_lowered: bool = False
    """Whether the steps were run again with a lower learning rate or a tighter clip, so that a
    "transient" verdict may be due to these."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Causes confirmed by an experiment -> how they were confirmed."""
    batch: tuple[str, ...] = ()
    """Problems found in the batch that the first batch of the fit does not have, one phrase each:
    values that are NaN or infinite, or of another scale."""
    unscaled: tuple[str, ...] = ()
    """Values of the batch that are not normalised, and were not in the first batch either."""
    unusual: tuple[str, ...] = ()
    """In what the batch differs from recent ones: repetition, labels, lengths, scale; one phrase
    each, see `lit_stability.measurement.batch_statistics`."""
    batch_examined: bool = False
    """Whether the batch was examined; if so, and ``batch`` is empty, nothing is wrong with it."""
    bad_from_start: frozenset[str] = frozenset()
    """Names of the buffers that were non-finite when the fit began."""
    layer_types: frozenset[str] = frozenset()
    """Class names of the modules, in lower case; empty if not known."""
    optimizer_type: str = ""
    """Class name of the optimizer, in lower case; "" if not known."""
    batches_per_epoch: float | None = None
    """None if not known."""
    sensitivity_at_start: float | None = None
    """Gradient norm times weight norm, divided by the loss, in the first step of the run: by how
    much the loss changes, relative to itself, when the weights change by a given share. About 1 to
    300 for common networks at their initialisation. None if not known."""
    precision: str = "32-true"
    """Lightning's name of the precision."""
    phase: Phase | None = None
    """Phase of the run at the last accepted step."""
    phase_range: PhaseRange | None = None
    """Gradient norms of that phase so far."""
    accumulation: int = 1
    """Batches per optimizer step."""
    manual: bool = False
    """Whether the module steps its optimizers itself."""
    momentum: float | None = None
    """Momentum of the optimizer; Adam's first beta."""
    clips: bool = False
    """Whether the Trainer clips gradients."""
    rate_rose: bool = True
    """Whether the learning rate has ever risen, that is, whether there was a warm-up."""
    restorable: bool | None = None
    """Whether there is a good state to restore; None if not known."""

    @cached_property
    def losses(self) -> tuple[float, ...]:
        """Recent losses, the loss of the bad step included."""
        before = tuple(s.loss for s in self.history if s.has_loss)
        return (
            before if self.stats is None or not self.stats.has_loss else (*before, self.stats.loss)
        )

    @cached_property
    def pattern(self) -> LossPattern | None:
        """Pattern in which the loss diverges."""
        return loss_pattern(self.losses)

    @property
    def since(self) -> int:
        """Optimizer step at which the trouble began, as far as the losses show it."""
        steps = 0 if self.pattern is None else self.pattern.steps
        return max(0, min(self.anomaly.suspect, self.anomaly.step - steps))

    @property
    def mixed(self) -> bool:
        """Whether forward and backward compute in 16 bits."""
        return "16" in self.precision

    @cached_property
    def gradient_ratio(self) -> float | None:
        """Gradient norm of the bad step relative to its median before; None if not known."""
        norms = [s.grad_norm for s in self.history if 0 < s.grad_norm < math.inf]
        if self.stats is None or len(norms) < 3:
            return None
        return self.stats.grad_norm / median(norms)

    @cached_property
    def loss_is_ordinary(self) -> bool | None:
        """Whether the loss of the bad step is one of the usual; None if not known."""
        before = sorted(s.loss for s in self.history[-50:] if s.has_loss)
        if self.stats is None or not self.stats.has_loss or len(before) < 3:
            return None
        spread = before[-1] - before[0]
        return self.pattern is None and self.stats.loss <= before[-1] + spread

    @property
    def update_excess(self) -> float | None:
        """Last update-to-weight ratio relative to its median before; None if not known."""
        ratios = [s.update_ratio for s in self.history if s.update_ratio]
        if self.stats is None or not self.stats.update_ratio or len(ratios) < 3:
            return None
        return self.stats.update_ratio / median(ratios)

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """Largest nominal learning rate of each step of the history and of the bad step."""
        steps = [*self.history, *([] if self.stats is None else [self.stats])]
        return tuple(max(s.nominal_learning_rates, default=0.0) for s in steps)

    def reading(self, quantity: str) -> tuple[str, float] | None:
        """Returns place and value of the largest reading in the last probe of a quantity."""
        for stats in [*([] if self.stats is None else [self.stats]), *reversed(self.history)]:
            for found in stats.readings_of(quantity)[:1]:
                return found.where, found.value
        return None

    def layers(self, count: int = 5) -> list[tuple[str, float]]:
        """Returns the parameters with the largest ratio of gradient norm to its own earlier median.

        Non-finite ones come first. Without a history, the layers of the anomaly are returned.

        Args:
            count: largest number of parameters.
        """
        stats = self.stats
        if stats is None or len(self.history) < 3 or not stats.names:
            return list(self.anomaly.layers)[:count]
        before = [s for s in self.history[-20:] if s.names == stats.names]
        ratios = [
            (name, _ratio(stats.grad_norms[i], [s.grad_norms[i] for s in before]))
            for i, name in enumerate(stats.names)
        ]
        ratios.sort(key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf, reverse=True)
        return ratios[:count]


def _ratio(norm: float, before: Sequence[float]) -> float:
    middle = median([n for n in before if math.isfinite(n)] or [0.0])
    return norm / middle if middle > 0 else (norm if not math.isfinite(norm) else 1.0)
