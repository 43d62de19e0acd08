"""The measurements of a checkpoint and the findings, as plain counts, floats and strings.

Imports neither torch nor Lightning.
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
    """Measurements of one tensor of a state dict; all except counts are of its finite elements."""

    name: str
    kind: Kind
    """A state dict does not distinguish parameters from buffers: buffers of torch's own layers are
    recognised by name, every other floating-point tensor counts as a parameter."""
    shape: tuple[int, ...]
    dtype: str
    """Without the prefix ``torch.``."""
    elements: int
    norm: float = 0.0
    """Euclidean norm."""
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
    """Number of elements above the widest gap among the largest magnitudes."""
    torn_ratio: float = 1.0
    """Ratio at this gap: the largest of one of the eight largest magnitudes to the next smaller."""
    same_memory: str | None = None
    """Name of the first tensor with the same memory (tied weights), or None."""
    same_values: str | None = None
    """Name of the first tensor with the same values in other memory; None for constant tensors."""

    @property
    def finite(self) -> int:
        """Number of finite elements."""
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
        """Whether all elements are 0 or -inf, as in an attention mask."""
        return self.negative_inf > 0 and self.negative_inf + self.zeros == self.elements

    @property
    def damaged(self) -> int:
        """Number of elements that are NaN or Inf; 0 if the tensor is a mask."""
        return 0 if self.is_mask else self.elements - self.finite

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        derived = {"rms": self.rms, "largest": self.largest, "zero_share": self.zero_share}
        return asdict(self) | derived


@dataclass(frozen=True, kw_only=True)
class MomentHealth:
    """Measurements of the optimizer state of one parameter."""

    name: str
    """Name of the parameter; ``unnamed 3`` with its index if the name is unknown."""
    optimizer: int
    """Index among the checkpoint's optimizers."""
    index: int
    """Index of the parameter in the optimizer's groups, as in its state dict."""
    step: float | None = None
    """Number of updates; None if the optimizer does not count them."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """Norm of each tensor of the state by its key, such as ``exp_avg``."""
    non_finite: Mapping[str, int] = field(default_factory=dict)
    """Number of NaN and Inf elements by key; keys without any are omitted."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Dtype of each tensor by its key."""
    negative: int = 0
    """Number of negative elements in the second moment, which is a mean of squares."""
    elements: int = 0
    signal: float | None = None
    """Norm of ``exp_avg`` divided by that of ``sqrt(exp_avg_sq)``, with bias correction. Near 1
    the gradients of successive steps agree; near 0 they are noise, or the first moment is stale.
    None without both moments."""
    ratio: float | None = None
    """Largest ``|exp_avg| / sqrt(exp_avg_sq)`` of an element, uncorrected; None without both."""
    ratio_bound: float | None = None
    """Upper bound of `ratio` for the betas in the checkpoint; None if there is no bound."""

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """The training state in a Lightning checkpoint; empty for a bare state dict."""

    source: str = "a bare state dict"
    epoch: int | None = None
    global_step: int | None = None
    groups: tuple[Mapping[str, Any], ...] = ()
    """Options of each parameter group, with the index of its optimizer."""
    schedulers: tuple[Mapping[str, Any], ...] = ()
    scaler: Mapping[str, float] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that this package's callbacks saved, by name."""
    history: tuple[tuple[int, float, float], ...] = ()
    """Step, loss and gradient norm of the last steps, if `AnomalyCheckpoint` recorded them."""

    @property
    def trained(self) -> bool:
        """Whether at least ten steps were taken; the first may have a learning rate of 0."""
        return (self.global_step or 0) >= 10


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """The measurements of a checkpoint, and the findings that follow from them."""

    run: RunHealth
    tensors: tuple[TensorHealth, ...]
    """In the order of the state dict."""
    moments: tuple[MomentHealth, ...] = ()
    gradients: tuple[GradientDetail, ...] = ()
    """Of the offending step, if the checkpoint is an incident checkpoint."""
    findings: tuple[Finding, ...] = ()
    """Worst first."""

    @property
    def healthy(self) -> bool:
        """Whether there is no finding of severity ``error``."""
        return not self.of("error")

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Returns the findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; NaN and Inf stay floats."""
        return {
            "schema": 1,
            "healthy": self.healthy,
            "findings": [_finding_as_dict(finding) for finding in self.findings],
            "run": asdict(self.run),
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "moments": [moment.as_dict() for moment in self.moments],
            "gradients": [asdict(gradient) for gradient in self.gradients],
        }


def _finding_as_dict(finding: Finding) -> dict[str, Any]:
    values = asdict(finding)
    del values["check"]  # findings of a checkpoint name no check
    return values
