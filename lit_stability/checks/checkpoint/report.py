"""What was measured of a checkpoint, and what was found wrong with it.

Counts, floats and strings only; imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lit_stability.checks.finding import Finding, Severity
from lit_stability.measurement.step_stats import GradientDetail

Kind = Literal["parameter", "buffer", "integer"]


@dataclass(frozen=True, kw_only=True)
class TensorHealth:
    """One tensor of the state dict. All but the counts is of its finite elements."""

    name: str
    kind: Kind
    """A state dict does not tell parameters from buffers: those that torch's own layers keep are
    known by name, anything else of floats counts as a parameter."""
    shape: tuple[int, ...]
    dtype: str
    """Without the ``torch.`` in front."""
    elements: int
    norm: float = 0.0
    """Euclidean."""
    mean: float = 0.0
    std: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    zeros: int = 0
    """Elements that are exactly 0."""
    nan: int = 0
    positive_inf: int = 0
    negative_inf: int = 0
    zero_rows: int = 0
    """Rows along the first dimension that are all zero; 0 for fewer than two dimensions."""
    torn: int = 0
    """Elements above the widest gap among the largest magnitudes, where it is `torn_ratio` wide."""
    torn_ratio: float = 1.0
    """Largest ratio of one of the eight largest magnitudes to the next smaller one."""
    same_memory: str | None = None
    """The first tensor that shares its memory, as tied weights do."""
    same_values: str | None = None
    """The first tensor of another memory that has the same values, not all of them equal."""

    @property
    def finite(self) -> int:
        """Finite elements."""
        return self.elements - self.nan - self.positive_inf - self.negative_inf

    @property
    def rms(self) -> float:
        """Root mean square."""
        return self.norm / self.finite**0.5 if self.finite else 0.0

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        return max(abs(self.minimum), abs(self.maximum))

    @property
    def zero_share(self) -> float:
        """Share of the elements that are exactly 0."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def is_mask(self) -> bool:
        """Whether it holds 0 and -inf only, as an attention mask does on purpose."""
        return self.negative_inf > 0 and self.negative_inf + self.zeros == self.elements

    @property
    def damaged(self) -> int:
        """Elements that are NaN or Inf where no mask put them."""
        return 0 if self.is_mask else self.elements - self.finite

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        more = {"rms": self.rms, "largest": self.largest, "zero_share": self.zero_share}
        return asdict(self) | more


@dataclass(frozen=True, kw_only=True)
class MomentHealth:
    """The optimizer's state of one parameter."""

    name: str
    """Of the parameter, or ``unnamed 3`` after its index where that cannot be told."""
    optimizer: int
    """Index among the checkpoint's optimizers."""
    index: int
    """Index over the optimizer's groups, as its state dict counts."""
    step: float | None = None
    """Updates so far, None where the optimizer does not count."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """Norm of each tensor of the state, such as ``exp_avg``, by its key."""
    non_finite: Mapping[str, int] = field(default_factory=dict)
    """NaN and Inf elements by key, those that have some."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    negative: int = 0
    """Elements of the second moment below zero: a mean of squares cannot be."""
    elements: int = 0
    signal: float | None = None
    """Norm of ``exp_avg`` over that of ``sqrt(exp_avg_sq)``, both corrected for their start from 0:
    near 1 gradients agree from step to step, near 0 they are noise, or the first moment is stale;
    None without both."""
    ratio: float | None = None
    """Largest ``|exp_avg| / sqrt(exp_avg_sq)`` of an element, as they are; None without both."""
    ratio_bound: float | None = None
    """What `ratio` cannot exceed under the betas in the checkpoint; None where there is none."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """What a Lightning checkpoint says of its run; empty for a bare state dict."""

    source: str = "a bare state dict"
    epoch: int | None = None
    global_step: int | None = None
    groups: tuple[Mapping[str, Any], ...] = ()
    """Options of each parameter group, with the index of its optimizer."""
    schedulers: tuple[Mapping[str, Any], ...] = ()
    scaler: Mapping[str, float] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    """What this package's callbacks have saved: plain values by a name each."""
    history: tuple[tuple[int, float, float], ...] = ()
    """Step, loss and gradient norm of the last steps, where `AnomalyCheckpoint` has kept them."""

    @property
    def trained(self) -> bool:
        """Whether ten steps were taken: the first of a warm-up may have a learning rate of 0."""
        return (self.global_step or 0) >= 10


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """A checkpoint, measured, with what was found.

    ``findings`` come first to a reader; ``tensors`` and ``moments`` are the measurements that they
    rest on, ``run`` what the checkpoint says of its run.
    """

    run: RunHealth
    tensors: tuple[TensorHealth, ...]
    """In the order of the state dict."""
    moments: tuple[MomentHealth, ...] = ()
    gradients: tuple[GradientDetail, ...] = ()
    """Of the offending step, where the checkpoint is the scene of an incident."""
    findings: tuple[Finding, ...] = ()
    """The worst first."""

    @property
    def healthy(self) -> bool:
        """Whether nothing was found that is an error."""
        return not self.of("error")

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Findings of one severity."""
        return tuple(each for each in self.findings if each.severity == severity)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and Inf are still floats."""
        return {
            "schema": 1,
            "healthy": self.healthy,
            "findings": [_finding_as_dict(finding) for finding in self.findings],
            "run": asdict(self.run),
            "tensors": [each.as_dict() for each in self.tensors],
            "moments": [each.as_dict() for each in self.moments],
            "gradients": [asdict(each) for each in self.gradients],
        }


def _finding_as_dict(finding: Finding) -> dict[str, Any]:
    values = asdict(finding)
    del values["check"]  # findings of a checkpoint name no check
    return values
