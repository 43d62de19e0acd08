"""Judges whether a format can represent a model, and gives advice.

The verdict depends on:

* weights and activations: if one overflows, its layer has to stay in float32;
* gradients: there must be a loss scale with which at most `TOLERATED` of the nonzero elements
  become zero, and none overflows.

Activations that become zero or subnormal are reported, but do not affect the verdict, because they
rarely matter next to the large ones. All values are judged as if they were stored in the format;
autocast keeps norms, softmax and torch's losses in float32, so mixed precision may tolerate more.
Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_stability.checks.precision_ranges.bins import JUDGED
from lit_stability.checks.precision_ranges.limits import (
    STARVED,
    TOLERATED,
    LossScale,
    Overflow,
    loss_scale,
    not_finite,
    outermost,
    overflows,
    starved_layers,
)
from lit_stability.checks.precision_ranges.report import (
    INPUT,
    LOSS,
    ROOT,
    RangeReport,
    RangeRow,
    pooled,
)
from lit_stability.checks.text_table import join_names
from lit_stability.measurement.float_formats import BFLOAT16, FLOAT16, FloatFormat

Status = Literal["fits", "fits with a loss scale", "overflows", "no loss scale", "not finite"]
GRAD_SCALER_START = 16
"""`torch.amp.GradScaler` starts with a scale of 2**16."""


@dataclass(frozen=True)
class Verdict:
    """The effect of a format on a model, and advice."""

    format: str
    status: Status
    overflows: tuple[Overflow, ...]
    """Weights and activations, the largest share first."""
    scale: LossScale | None
    """The usable loss scales; None if there is none, or if nothing has a gradient."""
    starved: tuple[str, ...]
    """Layers that lose more than `STARVED` of their gradient even at the highest loss scale."""
    fp32_modules: tuple[str, ...]
    """Submodules to keep in float32; none is inside another one."""
    advice: tuple[str, ...]
    """Recommended actions, one sentence each."""

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


def judge(report: RangeReport, number_format: FloatFormat) -> Verdict:
    """Judges whether a format can represent the magnitudes of a model.

    Args:
        report: The measurement.
        number_format: A format of `JUDGED`.

    Raises:
        ValueError: If the format is not one of `JUDGED`.
    """
    if number_format not in JUDGED:
        names = ", ".join(judged.name for judged in JUDGED)
        raise ValueError(
            f"number_format={number_format.name} cannot be judged; choose from {names}"
        )
    gradients = report.of("weight gradients", "activation gradients")
    overflowing = overflows(report.of("weights", "activations"), number_format)
    everything = pooled(gradients)
    scale = loss_scale(everything, number_format) if everything else None
    non_finite = not_finite(report)
    status: Status = "fits"
    if non_finite or overflowing:
        status = "not finite" if non_finite else "overflows"
    elif everything and everything.nonzero and scale is None:
        status = "no loss scale"
    elif scale is not None and 0 not in scale:
        status = "fits with a loss scale"
    modules = outermost(overflow.layer for overflow in overflowing)
    starved = starved_layers(gradients, number_format)
    advice = (
        *_on_non_finite(non_finite),
        *_on_overflow(overflowing, modules, number_format),
        *_on_scale(scale, everything, number_format, starved),
        *_on_storage(report, number_format),
    )
    return Verdict(number_format.name, status, overflowing, scale, starved, modules, advice)


def _on_non_finite(rows: Sequence[RangeRow]) -> list[str]:
    if not rows:
        return []
    first = rows[0]
    return [
        f"fix this first: {first.kind} of {first.layer} are Inf or NaN in float32 already, which "
        f"no format can represent (rows with such values: {len(rows)})"
    ]


def _on_overflow(
    overflowing: Sequence[Overflow], modules: Sequence[str], number_format: FloatFormat
) -> list[str]:
    names, advice = {overflow.layer for overflow in overflowing}, []
    if INPUT in names:
        advice.append(
            f"normalize the inputs: magnitudes above {number_format.largest:.6g} overflow"
        )
    if modules:
        advice.append(
            "keep these modules, and modules that use their output, in float32: "
            f"fp32_modules={list(modules)}"
        )
    if ROOT in names:
        advice.append("the model's own weights or output overflow: keep the model in float32")
    if LOSS in names:
        advice.append(
            "compute the loss in float32, as autocast does with the losses of torch, or scale the "
            "targets down"
        )
    return advice


def _on_scale(
    scale: LossScale | None,
    row: RangeRow | None,
    number_format: FloatFormat,
    starved: Sequence[str],
) -> list[str]:
    if row is None or not row.nonzero:
        return ["no gradients were measured, so the required loss scale is unknown"]
    if scale is None:
        return [
            f"use bfloat16: no loss scale keeps {1 - TOLERATED:.1%} of the nonzero gradient "
            f"elements above zero without overflow ({row.smallest:.2g} to {row.largest:.2g}). Too "
            "small compared to the largest: "
            f"{join_names(starved, 5) or 'parts of many layers'}"
        ]
    advice = []
    if 0 not in scale or number_format == FLOAT16:
        advice.append(
            f"loss scales from 2^{scale.lowest} to 2^{scale.highest} are usable; "
            + _on_scaler(scale)
        )
    if starved:
        advice.append(
            f"at every loss scale, more than {STARVED:.0%} of the gradient becomes zero in "
            f"{join_names(starved, 5)}"
        )
    return advice


def _on_scaler(scale: LossScale) -> str:
    start = GRAD_SCALER_START
    if start in scale:
        return f"the initial scale of GradScaler, 2^{start}, is among them"
    if scale.highest < start:
        steps = start - scale.highest
        return (
            f"GradScaler starts at 2^{start} and skips {steps} steps until it reaches them; "
            f"GradScaler(init_scale=2.0**{scale.highest}) skips none"
        )
    return f"start there: GradScaler(init_scale=2.0**{scale.lowest})"


def _on_storage(report: RangeReport, number_format: FloatFormat) -> list[str]:
    """Returns the effects on weights and optimizer state stored in the format (16-true)."""
    row = pooled(report.of("weight gradients"))
    if row is None or not row.nonzero:
        return []
    if number_format == BFLOAT16:
        return [
            f"bf16-true only: updates below {number_format.epsilon / 4:.1%} of a weight are lost "
            "to rounding; bf16-mixed keeps weights in float32"
        ]
    squares, advice = row.squares_vanishing(number_format) / row.nonzero, []
    if number_format.vanishes(report.adam_epsilon):
        advice.append(f"Adam's eps={report.adam_epsilon:g} becomes 0")
    if squares > TOLERATED:
        advice.append(f"{squares:.1%} of the squared gradients become 0 in its second moment")
    if not advice:
        return []
    return [
        f"{number_format.name} weights and optimizer state only: {', '.join(advice)}; 16-mixed "
        "avoids this"
    ]
