"""What is wrong with weights, buffers and gradients; each threshold with its reason.

A threshold lies where no healthy model is known to come, rather than where most end: a report that
cries wolf is not read. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from lit_stability.checks.checkpoint.report import TensorHealth
from lit_stability.checks.finding import Finding, Severity
from lit_stability.diagnosis.layer_types import is_norm_gain
from lit_stability.measurement.step_stats import GradientDetail

TORN = 1e3
"""Ratio of the largest magnitudes to the next, from which on an element counts as torn away. A
Gaussian tensor of a billion elements stays below 2, a Student-t one of 3 degrees of freedom below
100 in one of a million; a flipped high bit of an exponent multiplies by 2**16 or more."""
DROWNED = 1e6
"""The same, as an error: the rest is below the last digits of float32 in any sum with it, so that
no training has made it."""
FEW = 16
"""Elements that a tensor must have for a gap to mean something: of few, any may be large."""
LARGE_RMS = 100.0
"""Root mean square of a matrix: initialisations end at 1, and a layer that multiplies by 100 per
element needs a norm behind it to be trained at all."""
LARGE_GRADIENT = 1000.0
"""Norm of one parameter's gradient, or of all; the bound that is used in the field."""


def tensor_findings(tensors: Sequence[TensorHealth], *, trained: bool) -> list[Finding]:
    """Look at every tensor of a state dict.

    Args:
        tensors: measured.
        trained: whether steps were taken; zeros on purpose are common before.
    """
    named = {each.name: each for each in tensors}
    # A tied weight is told of once.
    single = [each for each in tensors if each.same_memory is None]
    weights = [each for each in single if each.kind == "parameter"]
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
    """Look at the gradients of an incident, by parameter.

    Args:
        gradients: of the offending step, unscaled and unclipped.
    """
    bad = [each.name for each in gradients if not isfinite(each.norm)]
    large = sorted(
        (each for each in gradients if isfinite(each.norm) and each.norm > LARGE_GRADIENT),
        key=lambda each: -each.norm,
    )
    found = []
    if bad:
        found.append(
            Finding(
                severity="error",
                what="non-finite gradient",
                where=tuple(bad),
                why=f"{len(bad)} of {len(gradients)} gradients of the offending step are NaN or "
                "Inf",
                remedy="take that step again under NonFiniteLocator: it names the operation",
            )
        )
    if large:
        found.append(
            Finding(
                severity="warning",
                what="large gradient",
                where=tuple(each.name for each in large),
                why=f"a norm of up to {large[0].norm:.3g}, above {LARGE_GRADIENT:g}",
                remedy="clip the gradient norm, and look at the loss of that batch",
            )
        )
    return found


def _non_finite(tensors: Sequence[TensorHealth]) -> Iterable[Finding]:
    bad = sorted((t for t in tensors if t.damaged), key=lambda t: t.kind != "parameter")
    if bad:
        count = sum(t.damaged for t in bad)
        yield Finding(
            severity="error",
            what="non-finite weight" if bad[0].kind == "parameter" else "non-finite buffer",
            where=tuple(t.name for t in bad),
            why=f"{count} element{'s are' if count > 1 else ' is'} NaN or Inf: whatever they are "
            "multiplied with is too, and no later step heals them",
            remedy="go on from an earlier checkpoint; `lit-stability resume RUN` finds the last "
            "good one",
        )


def _variances(tensors: Sequence[TensorHealth]) -> Iterable[Finding]:
    kept = [t for t in tensors if t.name.rsplit(".", 1)[-1] == "running_var"]
    negative = [t.name for t in kept if t.minimum < 0]
    zero = [t.name for t in kept if t.minimum == 0 and t.finite]
    if negative:
        yield Finding(
            severity="error",
            what="negative running variance",
            where=tuple(negative),
            why="a variance cannot be below zero; BatchNorm takes its root in evaluation, which "
            "is NaN",
            remedy="go on from an earlier checkpoint, or count the statistics anew: "
            "reset_running_stats(), then training batches in train() without an update",
        )
    if zero:
        yield Finding(
            severity="warning",
            what="zero running variance",
            where=tuple(zero),
            why="some channels have not varied for hundreds of batches; in evaluation BatchNorm "
            "multiplies them by 1/sqrt(eps), 316 with torch's default, should they ever vary",
            remedy="look for dead units before that layer",
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
                why=f"{worst.torn} of {worst.elements} elements up to {worst.largest:.3g}, "
                f"{worst.torn_ratio:.2g} times the next largest: training moves elements "
                "together, a flipped bit or a bad write moves one",
                remedy="go on from an earlier checkpoint; if it comes back, test the memory of "
                "the device",
            )


def _large(weights: Sequence[TensorHealth]) -> Iterable[Finding]:
    # A torn element makes the mean large as well; it is told of already.
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
            "at "
            "65504, and learning rates meant for weights near 1 hardly move these",
            remedy="compare with an earlier checkpoint; lower the learning rate, add weight "
            "decay, or "
            "scale inputs and targets",
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
            why="a norm layer with a gain of zero lets nothing through"
            + (
                ", and a step that reaches it would have moved it: it was overwritten, or frozen"
                if trained
                else "; on purpose where a residual branch is to begin as nothing, or where the "
                "layer adds 1 to it"
            ),
            remedy="initialise the gains with 1, or see that they get a gradient",
        )


def _is_gain(tensor: TensorHealth, named: dict[str, TensorHealth]) -> bool:
    """Whether it is the gain of a norm layer: by its statistics, or its name."""
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
                why="every element is still, or again, exactly 0 after training: the layer says "
                "the "
                "same whatever comes in",
                remedy="see whether it gets a gradient, and whether it is used at all",
            )
    rows = [t for t in matrices if t.zeros < t.elements and _dead_rows(t, named)]
    if rows:
        rows.sort(key=lambda t: -t.zero_rows)
        yield Finding(
            severity="warning",
            what="dead rows",
            where=tuple(t.name for t in rows),
            why=f"{rows[0].zero_rows} of {rows[0].shape[0]} rows are exactly 0, which neither "
            "initialisation nor decay leaves: these units say the same whatever comes in",
            remedy="nothing, if the model was pruned; otherwise compare with an earlier checkpoint",
        )


def _dead_rows(tensor: TensorHealth, named: dict[str, TensorHealth]) -> bool:
    """Whether there are zero rows; of a table without bias one is left, the padding's."""
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
            why="equal to the last bit, in memory of their own"
            + (
                ": training, which moves them apart, has not touched them, or a tie was lost"
                if trained
                else "; layers copied from one another begin alike"
            ),
            remedy="nothing, if they are frozen, or a copy on purpose such as an average of "
            "weights",
        )
