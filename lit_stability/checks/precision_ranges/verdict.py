"""Would a format do? From what was measured to a verdict, with what to do about it.

What decides:

* a weight or an activation that overflows: its layer has to stay in float32;
* gradients: there must be a loss scale that keeps all but `TOLERATED` of the elements above zero
  from becoming zero, and lets none overflow.

Activations that become zero or subnormal are told, and decide nothing: next to the large ones
they seldom matter. Every value is judged as if it were stored in the format; autocast keeps
norms, softmax and the losses of torch in float32, so that mixed precision may bear more.
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
"""`torch.amp.GradScaler` begins with a scale of 2**16."""


@dataclass(frozen=True)
class Verdict:
    """What a format would do to a model, and what to do about it."""

    format: str
    status: Status
    overflows: tuple[Overflow, ...]
    """Weights and activations, the largest share first."""
    scale: LossScale | None
    """None where no loss scale will do, or nothing has a gradient."""
    starved: tuple[str, ...]
    """Layers that lose more than `STARVED` of their gradient even at the highest loss scale."""
    fp32_modules: tuple[str, ...]
    """Submodules to keep in float32, none inside another."""
    advice: tuple[str, ...]
    """What to do, a sentence each."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def judge(report: RangeReport, each: FloatFormat) -> Verdict:
    """Judge a format by what a model spans.

    Args:
        report: what was measured.
        each: a format of `JUDGED`.

    Raises:
        ValueError: if the format is another one.
    """
    if each not in JUDGED:
        names = ", ".join(one.name for one in JUDGED)
        raise ValueError(f"{each.name} is not judged; choose from {names}")
    gradients = report.of("weight gradients", "activation gradients")
    found = overflows(report.of("weights", "activations"), each)
    everything = pooled(gradients)
    scale = loss_scale(everything, each) if everything else None
    broken = not_finite(report)
    status: Status = "fits"
    if broken or found:
        status = "not finite" if broken else "overflows"
    elif everything and everything.nonzero and scale is None:
        status = "no loss scale"
    elif scale is not None and 0 not in scale:
        status = "fits with a loss scale"
    modules = outermost(each.layer for each in found)
    starved = starved_layers(gradients, each)
    advice = (
        *_on_broken(broken),
        *_against_overflow(found, modules, each),
        *_on_scale(scale, everything, each, starved),
        *_on_storage(report, each),
    )
    return Verdict(each.name, status, found, scale, starved, modules, advice)


def _on_broken(rows: Sequence[RangeRow]) -> list[str]:
    if not rows:
        return []
    first = rows[0]
    return [
        f"mend this first, no format can: {first.kind} of {first.layer} are Inf or NaN in float32 "
        f"already ({len(rows)} such rows)"
    ]


def _against_overflow(
    found: Sequence[Overflow], modules: Sequence[str], each: FloatFormat
) -> list[str]:
    names, advice = {one.layer for one in found}, []
    if INPUT in names:
        advice.append(f"normalize the inputs: magnitudes above {each.largest:.6g} overflow")
    if modules:
        advice.append(
            f"keep these, and what takes their output, in float32: fp32_modules={list(modules)}"
        )
    if ROOT in names:
        advice.append("the model's own weights or output overflow: keep the whole in float32")
    if LOSS in names:
        advice.append(
            "compute the loss in float32, as autocast does with the losses of torch, or scale the "
            "targets down"
        )
    return advice


def _on_scale(
    scale: LossScale | None, row: RangeRow | None, each: FloatFormat, starved: Sequence[str]
) -> list[str]:
    if row is None or not row.nonzero:
        return ["no gradient was seen: nothing can be said of a loss scale"]
    if scale is None:
        return [
            f"no loss scale keeps {1 - TOLERATED:.1%} of the gradients' elements above zero and "
            f"none from overflowing ({row.smallest:.2g} to {row.largest:.2g}); "
            "use bfloat16. Too small beside the largest: "
            f"{join_names(starved, 5) or 'parts of many layers'}"
        ]
    advice = []
    if 0 not in scale or each == FLOAT16:
        advice.append(
            f"loss scales from 2^{scale.lowest} to 2^{scale.highest} will do; " + _on_scaler(scale)
        )
    if starved:
        advice.append(
            f"even so more than {STARVED:.0%} of the gradient becomes zero in "
            f"{join_names(starved, 5)}"
        )
    return advice


def _on_scaler(scale: LossScale) -> str:
    start = GRAD_SCALER_START
    if start in scale:
        return f"GradScaler's first, 2^{start}, is one"
    if scale.highest < start:
        steps = start - scale.highest
        return (
            f"GradScaler, which begins at 2^{start}, will skip {steps} steps on its way there; "
            f"GradScaler(init_scale=2.0**{scale.highest}) none"
        )
    return f"begin there: GradScaler(init_scale=2.0**{scale.lowest})"


def _on_storage(report: RangeReport, each: FloatFormat) -> list[str]:
    """What becomes of weights and optimizer state that are stored in the format (16-true)."""
    row = pooled(report.of("weight gradients"))
    if row is None or not row.nonzero:
        return []
    if each == BFLOAT16:
        return [
            f"bf16-true only: an update below {each.epsilon / 4:.1%} of its weight rounds away; "
            "bf16-mixed keeps weights in float32"
        ]
    squares, advice = row.squares_vanishing(each) / row.nonzero, []
    if each.vanishes(report.adam_epsilon):
        advice.append(f"Adam's eps={report.adam_epsilon:g} becomes 0")
    if squares > TOLERATED:
        advice.append(f"{squares:.1%} of the squared gradients become 0 in its second moment")
    if not advice:
        return []
    return [f"{each.name} weights and states only: {', '.join(advice)}; 16-mixed has neither"]
