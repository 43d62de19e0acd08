"""Finds problems in the gradient norm, the learning rates, the loss scale and the validation loss.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from statistics import median

from lit_stability.checks.metric_log.causes import causes_of
from lit_stability.checks.metric_log.report import LogFinding
from lit_stability.checks.metric_log.series import Series, is_bad
from lit_stability.checks.metric_log.timeline import Timeline
from lit_stability.detectors.anomaly import Anomaly
from lit_stability.detectors.dead_learning_rate import DEAD_SHARE, DeadLearningRate
from lit_stability.detectors.loss_scale import LossScale
from lit_stability.detectors.trends import ROUNDING
from lit_stability.detectors.vanishing import Vanishing

_PERSIST = 20
"""Points for which a gradient norm must be zero, tiny or non-finite."""
_TINY = 1e-6
"""Bound of a vanishing gradient norm, as in a live run."""
_FALL = LossScale().halvings
"""Halvings of the loss scale that are worth a note."""
_CLEARLY = 1.05
"""Factor over its best value from which on a validation loss has risen."""
_FEWEST = 5
"""Validation losses needed to judge their course."""


def signal_findings(timeline: Timeline) -> Iterator[LogFinding]:
    """Returns the findings on everything but the training loss."""
    yield from _loss_scale(timeline)
    yield from _gradient(timeline)
    yield from _learning_rate(timeline)
    yield from _validation(timeline)


def _loss_scale(timeline: Timeline) -> Iterator[LogFinding]:
    scale, floor = timeline.roles.loss_scale, LossScale().floor
    if scale is None or not len(scale):
        return
    low = next((i for i, value in enumerate(scale.values) if not floor <= value < math.inf), None)
    if low is not None:
        step, value = scale.steps[low], scale.values[low]
        anomaly = Anomaly(
            kind="loss-scale collapse", step=step, value=value, signal="loss scale",
            message=f"the loss scale fell to {value:.3g}",
        )  # fmt: skip
        causes = causes_of(anomaly, timeline, timeline.index_of(step))
        fell = low
        while fell > 0 and scale.values[fell - 1] > scale.values[fell]:
            fell -= 1
        yield LogFinding(
            severity="error",
            check="loss scale",
            what=f"loss-scale collapse at step {step}",
            where=(scale.name,),
            why=f"it fell from {scale.values[fell]:.4g} at step {scale.steps[fell]} to "
            f"{value:.3g}: every overflow halves it, and below {floor:g} every step is skipped "
            "or its gradients are 0",
            remedy=causes[0].remedy,
            step=scale.steps[fell],
            causes=causes,
        )
        return
    highest, since = 0.0, 0
    for i, value in enumerate(scale.values):
        if value >= highest:
            highest, since = value, i
    lowest = min(scale.values[since:])
    if highest >= lowest * 2**_FALL:
        yield LogFinding(
            severity="note",
            check="loss scale",
            what="loss-scale fall",
            where=(scale.name,),
            why=f"it fell from {highest:.4g} at step {scale.steps[since]} to {lowest:.4g}; "
            "a scaler that starts high does that while it searches for its scale",
            remedy="nothing, if it was at the start; else look for values that overflow in 16 bits",
            step=scale.steps[since],
        )


def _gradient(timeline: Timeline) -> Iterator[LogFinding]:
    norms = timeline.roles.gradient_norm
    if norms is None or not len(norms):
        return
    yield from _non_finite_gradient(norms, timeline)
    zeros = len(norms) - norms.tail(lambda value: value == 0)
    if zeros >= _PERSIST and not _is_solved(timeline):
        step = norms.steps[-zeros]
        anomaly = Anomaly(
            kind="dead gradients", step=step, value=0.0, signal="grad_norm",
            message="the gradient norm is exactly 0",
        )  # fmt: skip
        causes = causes_of(anomaly, timeline, timeline.index_of(step))
        yield LogFinding(
            severity="error",
            check="gradient norm",
            what=f"gradient norm of 0 from step {step} on",
            where=(norms.name,),
            why=f"it is exactly 0 at the last {zeros} points, so nothing is learnt",
            remedy=causes[0].remedy,
            step=step,
            causes=causes,
        )
        return
    yield from _vanishing(norms, timeline)


def _non_finite_gradient(norms: Series, timeline: Timeline) -> Iterator[LogFinding]:
    bad = len(norms) - norms.tail(is_bad)
    loss = timeline.roles.loss.values[-1]
    if bad < _PERSIST or not math.isfinite(loss) or loss == 0:
        return  # a loss of NaN, or 0 in place of it, is a finding of its own
    step = norms.steps[-bad]
    anomaly = Anomaly(
        kind="non-finite gradient", step=step, value=norms.values[-1], signal="grad_norm",
        message="the gradient norm is not finite",
    )  # fmt: skip
    causes = causes_of(anomaly, timeline, timeline.index_of(step))
    yield LogFinding(
        severity="error",
        check="gradient norm",
        what=f"non-finite gradient from step {step} on",
        where=(norms.name,),
        why=f"it is NaN or Inf at the last {bad} points although the loss is finite: every step is "
        "skipped by a loss scaler, or damages the weights",
        remedy=causes[0].remedy if causes else "look for operations whose gradient is not finite",
        step=step,
        causes=causes,
    )


def _vanishing(norms: Series, timeline: Timeline) -> Iterator[LogFinding]:
    if not any(0 < value < _TINY for value in norms.values):
        return  # a million points would take a minute
    detector = Vanishing(bound=_TINY, persist=_PERSIST, min_step=0)
    for stats in timeline.all_stats():
        if not math.isfinite(stats.loss) or not 0 < stats.grad_norm < math.inf:
            continue
        anomaly = detector.check(stats)
        detector.update(stats)
        if anomaly is not None:
            index = anomaly.step
            step = timeline.roles.loss.steps[index]
            shown = Anomaly(
                kind="vanishing gradient", step=step, value=anomaly.value, signal="grad_norm",
                message=anomaly.message,
            )  # fmt: skip
            causes = causes_of(shown, timeline, index)
            yield LogFinding(
                severity="warning",
                check="gradient norm",
                what=f"vanishing gradient by step {step}",
                where=(norms.name,),
                why=f"the norm stays at {anomaly.value:.3g} and the loss does not fall",
                remedy=causes[0].remedy,
                step=step,
                certainty="likely",
                causes=causes,
            )
            return


def _learning_rate(timeline: Timeline) -> Iterator[LogFinding]:
    rates, watch = timeline.roles.learning_rates, DeadLearningRate()
    if not any(map(len, rates)):
        return
    bad = [s for s in rates if any(not math.isfinite(v) or v < 0 for v in s.values)]
    if bad:
        at = next(i for i, v in enumerate(bad[0].values) if not math.isfinite(v) or v < 0)
        yield LogFinding(
            severity="error",
            check="learning rate",
            what=f"impossible learning rate at step {bad[0].steps[at]}",
            where=tuple(s.name for s in bad),
            why=f"the learning rate is {bad[0].values[at]}",
            remedy="check the scheduler",
            step=bad[0].steps[at],
        )
        return
    if not any(_dies(series) for series in rates):
        return  # a million points would take a minute
    for stats in timeline.all_stats():
        if not math.isfinite(stats.loss) or not stats.learning_rates:
            continue
        dead = watch.update(stats.step, 0, stats.loss, stats.learning_rates)
        if dead is None:
            continue
        step = timeline.roles.loss.steps[dead.since]
        anomaly = Anomaly(
            kind="dead learning rate", step=step, value=dead.rate, signal="learning rate",
            message=f"the learning rate is {dead.rate:.3g}, its largest was {dead.peak:.3g}",
        )  # fmt: skip
        causes = causes_of(anomaly, timeline, dead.since)
        left = timeline.roles.loss.steps[-1] - step
        yield LogFinding(
            severity="warning",
            check="learning rate",
            what=f"dead learning rate from step {step} on",
            where=tuple(s.name for s in rates),
            why=f"it is {dead.rate:.3g} since then, its largest was {dead.peak:.3g}; the loss was "
            f"still falling, and {left} more steps were logged",
            remedy=causes[0].remedy,
            step=step,
            causes=causes,
        )
        return


def _dies(series: Series) -> bool:
    """Whether a learning rate is next to nothing beside an earlier one, for long enough."""
    largest = accumulate(series.values, max)
    shares = (v / p for v, p in zip(series.values, largest, strict=True) if p > 0)
    return sum(share <= 2 * DEAD_SHARE for share in shares) >= max(_PERSIST, len(series) // 20)


def _validation(timeline: Timeline) -> Iterator[LogFinding]:
    held_out, loss = timeline.roles.validation_loss, timeline.roles.loss
    if held_out is None or not len(held_out):
        return
    bad = len(held_out) - held_out.tail(is_bad)
    if bad and math.isfinite(loss.values[-1]) and loss.values[-1] != 0:
        yield LogFinding(
            severity="warning",
            check="validation",
            what=f"non-finite validation loss from step {held_out.steps[-bad]} on",
            where=(held_out.name,),
            why="the training loss is finite, so the weights are: it is the evaluation that fails",
            remedy="look for empty batches and for operations that only the validation step has",
            step=held_out.steps[-bad],
        )
    yield from _overfitting(held_out, loss)


def _overfitting(held_out: Series, loss: Series) -> Iterator[LogFinding]:
    values = [v for v in held_out.values if math.isfinite(v)]
    if len(values) < _FEWEST or len(values) < len(held_out):
        return
    best = min(values)
    at = values.index(best)
    last = median(values[-3:])
    noise = 1.4826 * median(abs(b - a) for a, b in pairwise(values)) / math.sqrt(2)
    rise = last - best
    if len(values) - at < 4 or rise < (_CLEARLY - 1) * abs(best) or rise < 4 * noise:
        return
    then = bisect_right(loss.steps, held_out.steps[at])
    before = [v for v in loss.values[max(0, then - 20) : then] if math.isfinite(v)]
    after = [v for v in loss.values[max(then, len(loss) - 20) :] if math.isfinite(v)]
    if not before or not after or median(after) >= median(before):
        return
    yield LogFinding(
        severity="note",
        check="validation",
        what=f"overfitting since step {held_out.steps[at]}",
        where=(held_out.name,),
        why=f"the validation loss rose from {best:.4g} to {last:.4g} while the training loss fell "
        f"from {median(before):.4g} to {median(after):.4g}",
        remedy=f"use the checkpoint of step {held_out.steps[at]}; more data, or regularisation",
        step=held_out.steps[at],
        certainty="likely",
    )


def _is_solved(timeline: Timeline) -> bool:
    """Whether the loss is 0, or next to nothing beside its first value."""
    values = [v for v in timeline.roles.loss.values if math.isfinite(v)]
    return not values or abs(values[-1]) <= max(1e-3 * abs(values[0]), ROUNDING)
