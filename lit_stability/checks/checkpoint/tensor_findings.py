"""Finds problems in weights, buffers and gradients; each threshold states its reason.

Thresholds are set so that no known healthy model exceeds them, to avoid false alarms. Imports
neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from lit_stability.checks.checkpoint.report import TensorHealth
from lit_stability.checks.finding import Finding, Severity
from lit_stability.diagnosis.layer_types import is_norm_gain
from lit_stability.measurement.step_stats import GradientDetail

TORN = 1e3
"""Ratio of the largest magnitudes to the next one from which elements count as torn. A Gaussian
tensor of a billion elements stays below 2, a Student-t one with 3 degrees of freedom below 100 in
all but one of a million; a flipped high bit of an exponent multiplies by 2**16 or more."""
DROWNED = 1e6
"""The same for an error: the other elements are below the last digits of float32 in any sum with
the torn one, so training cannot have caused it."""
FEW = 16
"""Smallest number of elements for which a gap is meaningful."""
LARGE_RMS = 100.0
"""Root mean square of a matrix: initialisations are at most 1, and a layer that multiplies by 100
per element can train only with a norm layer behind it."""
LARGE_GRADIENT = 1000.0
"""Norm of one parameter's gradient, or of all gradients; a commonly used bound."""


def tensor_findings(tensors: Sequence[TensorHealth], *, trained: bool) -> list[Finding]:
    """Returns the findings on the tensors of a state dict.

    Args:
        tensors: The measured tensors.
        trained: Whether the model was trained; before training, intended zeros are common.
    """
    named = {tensor.name: tensor for tensor in tensors}
    # Tied weights are reported once.
    single = [tensor for tensor in tensors if tensor.same_memory is None]
    weights = [tensor for tensor in single if tensor.kind == "parameter"]
    return [
        *_non_finite(single),
        *_variances(single),
        *_torn(weights),
        *_large(weights),
        *_gains(weights, named, trained),
        *_empty(weights, named, trained),
        *_twins(weights, trained),
    ]


def gradient_findings(gradients: Sequence[GradientDetail]) -> list[Finding]:
    """Returns the findings on the gradients of an incident.

    Args:
        gradients: Of the offending step, unscaled and unclipped.
    """
    bad = [gradient.name for gradient in gradients if not isfinite(gradient.norm)]
    large = sorted(
        (g for g in gradients if isfinite(g.norm) and g.norm > LARGE_GRADIENT),
        key=lambda g: -g.norm,
    )
    findings = []
    if bad:
        findings.append(
            Finding(
                severity="error",
                what="non-finite gradient",
                where=tuple(bad),
                why=f"{len(bad)} of {len(gradients)} gradients of the offending step are NaN or "
                "Inf",
                remedy="run this step again with NonFiniteLocator, which names the operation",
            )
        )
    if large:
        findings.append(
            Finding(
                severity="warning",
                what="large gradient",
                where=tuple(gradient.name for gradient in large),
                why=f"a norm of up to {large[0].norm:.3g}, above {LARGE_GRADIENT:g}",
                remedy="clip the gradient norm, and check the loss of this batch",
            )
        )
    return findings


def _non_finite(tensors: Sequence[TensorHealth]) -> Iterable[Finding]:
    bad = sorted((t for t in tensors if t.damaged), key=lambda t: t.kind != "parameter")
    if bad:
        count = sum(t.damaged for t in bad)
        yield Finding(
            severity="error",
            what="non-finite weight" if bad[0].kind == "parameter" else "non-finite buffer",
            where=tuple(t.name for t in bad),
            why=f"{count} element{'s are' if count > 1 else ' is'} NaN or Inf: all results "
            "computed from them are too, and no later step repairs them",
            remedy="resume from an earlier checkpoint; `lit-stability resume RUN` finds the last "
            "good one",
        )


def _variances(tensors: Sequence[TensorHealth]) -> Iterable[Finding]:
    variances = [t for t in tensors if t.name.rsplit(".", 1)[-1] == "running_var"]
    negative = [t.name for t in variances if t.minimum < 0]
    zero = [t.name for t in variances if t.minimum == 0 and t.finite]
    if negative:
        yield Finding(
            severity="error",
            what="negative running variance",
            where=tuple(negative),
            why="a variance cannot be negative; in eval mode BatchNorm takes its square root, "
            "which is NaN",
            remedy="resume from an earlier checkpoint, or recompute the statistics: "
            "reset_running_stats(), then run training batches in train() without an update",
        )
    if zero:
        yield Finding(
            severity="warning",
            what="zero running variance",
            where=tuple(zero),
            why="some channels were constant for hundreds of batches; if they ever vary in eval "
            "mode, BatchNorm multiplies them by 1/sqrt(eps), 316 with torch's default",
            remedy="look for dead units before this layer",
        )


def _torn(weights: Sequence[TensorHealth]) -> Iterable[Finding]:
    torn = [t for t in weights if t.torn_ratio >= TORN and t.elements - t.zeros >= FEW]
    levels: tuple[tuple[Severity, list[TensorHealth]], ...] = (
        ("error", [t for t in torn if t.torn_ratio >= DROWNED]),
        ("warning", [t for t in torn if t.torn_ratio < DROWNED]),
    )
    for severity, of_level in levels:
        if of_level:
            worst = max(of_level, key=lambda t: t.torn_ratio)
            yield Finding(
                severity=severity,
                what="torn element",
                where=tuple(t.name for t in sorted(of_level, key=lambda t: -t.torn_ratio)),
                why=f"{worst.torn} of {worst.elements} elements are up to {worst.largest:.3g}, "
                f"{worst.torn_ratio:.2g} times the next largest; training changes elements "
                "together, a flipped bit or a bad write changes one",
                remedy="resume from an earlier checkpoint; if it recurs, test the memory of the "
                "device",
            )


def _large(weights: Sequence[TensorHealth]) -> Iterable[Finding]:
    # A torn element also makes the root mean square large, but is already reported by `_torn`.
    large = [
        t
        for t in weights
        if len(t.shape) > 1 and t.rms > LARGE_RMS and (t.torn_ratio < TORN or t.elements < FEW)
    ]
    if large:
        large.sort(key=lambda t: -t.rms)
        yield Finding(
            severity="warning",
            what="large weights",
            where=tuple(t.name for t in large),
            why=f"root mean square up to {large[0].rms:.3g}, above {LARGE_RMS:g}: fp16 overflows "
            "at 65504, and learning rates for weights near 1 hardly change these",
            remedy="compare with an earlier checkpoint; lower the learning rate, add weight decay, "
            "or scale inputs and targets",
        )


def _gains(
    weights: Sequence[TensorHealth], named: dict[str, TensorHealth], trained: bool
) -> Iterable[Finding]:
    zero = tuple(t.name for t in weights if _is_gain(t, named) and t.zeros == t.elements)
    if zero:
        yield Finding(
            severity="error" if trained else "note",
            what="zeroed gain",
            where=zero,
            why="a norm layer with a gain of zero has a constant output"
            + (
                "; training would have changed the gain, so it was overwritten or frozen"
                if trained
                else "; intended if a residual branch starts at zero, or if the layer adds 1 to "
                "the gain"
            ),
            remedy="initialise the gains at 1, or check that they get a gradient",
        )


def _is_gain(tensor: TensorHealth, named: dict[str, TensorHealth]) -> bool:
    """Returns whether a tensor is the gain of a norm layer, by its running statistics or name."""
    module, _, last = tensor.name.rpartition(".")
    if len(tensor.shape) != 1:
        return False
    with_statistics = last == "weight" and f"{module}.running_var" in named
    return with_statistics or is_norm_gain(tensor.name)


def _empty(
    weights: Sequence[TensorHealth], named: dict[str, TensorHealth], trained: bool
) -> Iterable[Finding]:
    matrices = [t for t in weights if len(t.shape) > 1 and t.elements]
    if trained:
        zero = tuple(t.name for t in matrices if t.zeros == t.elements)
        if zero:
            yield Finding(
                severity="warning",
                what="zero matrix",
                where=zero,
                why="all elements are exactly 0 after training, so the output of the layer does "
                "not depend on its input",
                remedy="check that it gets a gradient, and that it is used",
            )
    rows = [t for t in matrices if t.zeros < t.elements and _dead_rows(t, named)]
    if rows:
        rows.sort(key=lambda t: -t.zero_rows)
        yield Finding(
            severity="warning",
            what="dead rows",
            where=tuple(t.name for t in rows),
            why=f"{rows[0].zero_rows} of {rows[0].shape[0]} rows are exactly 0, which neither "
            "initialisation nor weight decay causes; these units have a constant output",
            remedy="nothing, if the model was pruned; otherwise compare with an earlier checkpoint",
        )


def _dead_rows(tensor: TensorHealth, named: dict[str, TensorHealth]) -> bool:
    """Returns whether a matrix has zero rows; without a bias, one is accepted as padding."""
    bias = named.get(f"{tensor.name.rpartition('.')[0]}.bias")
    has_bias = bias is not None and bias.shape == tensor.shape[:1]
    return tensor.zero_rows > (0 if has_bias else 1)


def _twins(weights: Sequence[TensorHealth], trained: bool) -> Iterable[Finding]:
    twins = [t for t in weights if t.same_values]
    if twins:
        yield Finding(
            severity="warning" if trained else "note",
            what="equal tensors",
            where=tuple(f"{t.name} = {t.same_values}" for t in twins),
            why="bitwise equal, but separate in memory"
            + (
                "; training makes weights differ, so they were not trained, or a tie was lost"
                if trained
                else "; layers copied from one another start equal"
            ),
            remedy="nothing, if they are frozen, or an intended copy such as an average of weights",
        )
