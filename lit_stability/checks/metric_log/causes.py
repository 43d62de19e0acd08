"""The causes that a metric log can show, by the names of `lit_stability.diagnosis`.

Their evidence is a subset of that of a live run, since a log has no batch, layer or operation; the
remedies do not assume that the suite was attached. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from statistics import median

from lit_stability.checks.metric_log.gradient_course import GradientRise, rise_before
from lit_stability.checks.metric_log.series import Series
from lit_stability.checks.metric_log.timeline import HISTORY, Timeline
from lit_stability.detectors.anomaly import Anomaly
from lit_stability.diagnosis import evidence as c
from lit_stability.diagnosis.cause import Cause, EvidenceRule, LikelyCause, diagnose
from lit_stability.diagnosis.context import DiagnosisContext

_PEAK = 0.5
"""Share of its largest value so far from which on a learning rate counts as near its peak."""
_HIGH = 3.0
"""Factor over the median loss that counts as a loss that has risen."""
_TINY = 2.0**-149
"""Smallest positive float32: a loss scale of 0 was halved to it before."""
_JUMP = 5.0
"""Factor over all earlier learning rates that counts as a jump."""


@dataclass(frozen=True, kw_only=True)
class LogContext(DiagnosisContext):
    """A diagnosis context with what only a whole log shows."""

    gradient_rise: GradientRise | None = None
    """How the gradient norm grew before the event; None if it did not."""
    halvings: int = 0
    """How often the loss scale was halved from the event on."""
    peak_rate: float = 0.0
    """Largest learning rate up to the event, 0 if none is known."""


def _pattern(name: str) -> EvidenceRule:
    """Returns a rule: the loss has a pattern; its steps are points of the log."""

    def rule(context: DiagnosisContext) -> str | None:
        found = context.pattern
        if found is None or found.name != name:
            return None
        text = found.text if _is_dense(context) else found.text.replace("step", "point")
        return f"{found.name}: {text}"

    return rule


def _is_dense(context: DiagnosisContext) -> bool:
    """Whether every step was logged."""
    return bool(context.history) and context.anomaly.step - context.history[-1].step == 1


def _was_high(context: DiagnosisContext) -> str | None:
    """The loss had already risen at the two points before the event."""
    before = [s.loss for s in context.history if math.isfinite(s.loss)]
    if len(before) < 3:
        return None
    usual = median(before[-22:-2])
    if not 0 < _HIGH * usual < min(before[-2:]):
        return None
    return f"the loss had risen from {usual:.4g} to {before[-1]:.4g} before"


def _scale_falls(context: DiagnosisContext) -> str | None:
    """The loss scale falls from the event on: overflow follows overflow."""
    halvings = context.halvings if isinstance(context, LogContext) else 0
    return f"the loss scale was halved {halvings} times from then on" if halvings >= 8 else None


def _sudden(context: DiagnosisContext) -> str | None:
    """The loss was ordinary right before, where every step was logged."""
    return c.sudden_nan(context) if _is_dense(context) else None


def _gradient_led(context: DiagnosisContext) -> str | None:
    """The gradient norm grew before the event."""
    rise = context.gradient_rise if isinstance(context, LogContext) else None
    return None if rise is None else rise.text()


def _near_peak(context: DiagnosisContext) -> str | None:
    """The learning rate was near its largest."""
    peak = context.peak_rate if isinstance(context, LogContext) else 0.0
    rate = context.rates[-1]
    if peak <= 0 or rate < _PEAK * peak or not c.TROUBLE(context):
        return None
    return f"the learning rate was {rate:.3g}, its largest so far {peak:.3g}"


def _rate_jumped(context: DiagnosisContext) -> str | None:
    """At one of the last 50 points the learning rate rose far above all earlier ones."""
    rates = context.rates
    for i in range(max(5, len(rates) - 50), len(rates)):
        if 0 < _JUMP * max(rates[:i]) < rates[i]:
            return f"the learning rate jumped from {max(rates[:i]):.3g} to {rates[i]:.3g}"
    return None


_GROWS = _pattern("exponential growth")
_SWINGS = _pattern("oscillating divergence")
_JUMPS = _pattern("sudden jump")

LOG_CAUSES = (
    Cause(
        name="numeric precision",
        rules=(
            (8, c.kind("loss-scale collapse")),
            (2, c.both(c.BROKEN, c.mixed_precision)),
            (4, c.both(c.BROKEN, _scale_falls)),
        ),
        remedy="train in bf16 or 32-bit precision; look for values that overflow in 16 bits, "
        "such as unscaled inputs, from this step on",
        ignore_when="during the first steps in fp16",
    ),
    Cause(
        name="learning rate too high",
        rules=(
            (3, _GROWS),
            (2, _SWINGS),
            (3, _was_high),
            (2, c.DIVERGES),
            (2, _gradient_led),
            (1, c.warming_up),
            (1, _near_peak),
        ),
        contradictions=(c.no_step_yet, _sudden),
        remedy="lower the learning rate by 2 to 10, warm up longer, or clip gradients",
        ignore_when="if the loss still decreases",
    ),
    Cause(
        name="learning rate jumped",
        rules=((8, c.both(c.TROUBLE, _rate_jumped)),),
        remedy="fix the scheduler: it set a learning rate far above all earlier ones",
        ignore_when="if the jump is intended",
    ),
    Cause(
        name="schedule of the learning rate",
        rules=((8, c.kind("dead learning rate")), (3, c.both(_SWINGS, c.rate_changed))),
        remedy="check the scheduler's options and interval: a schedule for epochs that is stepped "
        "every batch ends much too early",
        ignore_when="if training was meant to end there",
    ),
    Cause(
        name="change of regime",
        rules=((4, c.kind("change of regime")),),
        remedy="find what changes at this step: the loss and its weights, the data or their scale, "
        "the trainable parts",
        ignore_when="if the change is intended",
    ),
    Cause(
        name="no warm-up",
        rules=((3, c.both(c.both(c.TROUBLE, c.no_warmup), c.early)), (1, _GROWS), (1, c.DIVERGES)),
        contradictions=(c.no_step_yet, _sudden),
        remedy="warm up over a few hundred steps",
        ignore_when="if the loss decreases as expected",
    ),
    Cause(
        name="bad batch",
        rules=(
            (2, c.kind("non-finite loss", "non-finite gradient", "loss spike")),
            (2, _JUMPS),
            (2, _sudden),
            (-2, _GROWS),
            (-3, _was_high),
            (-3, _gradient_led),
            (-3, _scale_falls),
        ),
        contradictions=(c.no_step_yet,),
        remedy="look at the batch of this step: values and labels out of range, empty or very long "
        "samples",
        ignore_when="if it is one of thousands and the loss came back",
    ),
    Cause(
        name="loss or labels",
        rules=((1, c.kind("non-finite loss")), (1, c.ordinary_gradient), (2, c.no_step_yet)),
        remedy="check the loss function for log(0), division by a count of zero and labels out of "
        "range",
        ignore_when="never, if it recurs",
    ),
    Cause(
        name="initialisation",
        rules=((4, c.both(c.BROKEN, c.no_step_yet)), (2, c.kind("no learning"))),
        remedy="run `lit-stability check`; initialise so that the first loss is that of a guess",
        ignore_when="if the loss decreases as expected",
    ),
    Cause(
        name="dead part of the model",
        rules=((8, c.kind("dead gradients")),),
        remedy="check that the loss depends on trainable weights: requires_grad, detach, no_grad, "
        "and the parameters that the optimizer got",
        ignore_when="if the loss is at its minimum",
    ),
    Cause(
        name="vanishing gradient",
        rules=((6, c.kind("vanishing gradient")),),
        remedy="check the gradient flow layer by layer; use norms before the sublayers, residual "
        "connections or a larger initialisation",
        ignore_when="during warm-up, and after the loss has converged",
    ),
)
"""Weighed by the rules of `diagnose`: 8 points make a cause certain, 4 likely, 2 possible."""


def causes_of(anomaly: Anomaly, timeline: Timeline, index: int) -> tuple[LikelyCause, ...]:
    """Returns the likely causes of an event in a log, the best supported first.

    Args:
        anomaly: The event, with the step in the log.
        timeline: Of the log.
        index: Of the point of the training loss at which the event is.
    """
    history, stats = timeline.history(index), timeline.stats(index)
    if math.isnan(anomaly.value):
        stats = replace(stats, loss=math.nan)  # a logger may have hidden it
    rates = [max(s.nominal_learning_rates, default=0.0) for s in (*history, stats)]
    step = timeline.roles.loss.steps[index]
    earlier = [s.values[: bisect_right(s.steps, step)] for s in timeline.roles.learning_rates]
    peak = max((max(values) for values in earlier if values), default=0.0)
    first = max((values[0] for values in earlier if values), default=0.0)
    context = LogContext(
        anomaly=anomaly,
        history=history,
        stats=stats,
        precision="32-true" if stats.loss_scale is None else "16-mixed",
        # Without logged rates a warm-up is not known to be missing.
        rate_rose=first == 0 or peak > first,
        phase="warm-up" if len(rates) > 2 and rates[-1] > max(rates[:-1]) else None,
        clips=True,  # not known, so it must not count as evidence
        gradient_rise=rise_before(timeline.roles.gradient_norm, anomaly.step),
        halvings=_halvings(timeline.roles.loss_scale, step),
        peak_rate=peak,
    )
    return tuple(diagnose(context, LOG_CAUSES, most=3))


def _halvings(scale: Series | None, step: int) -> int:
    """Returns the net number of halvings of the loss scale over the next points, 0 if unknown."""
    if scale is None:
        return 0
    at = max(0, bisect_right(scale.steps, step) - 2)
    before, after = scale.values[at], min(scale.values[at : at + HISTORY])
    return 0 if not after < before < math.inf else round(math.log2(before / max(after, _TINY)))
