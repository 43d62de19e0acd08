"""Finds what went wrong with the training loss: NaN, divergence, spikes, nothing learnt.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from lit_stability.checks.metric_log.causes import causes_of
from lit_stability.checks.metric_log.level_findings import divergence, no_learning
from lit_stability.checks.metric_log.loss_levels import LossLevels
from lit_stability.checks.metric_log.report import LogFinding
from lit_stability.checks.metric_log.series import MetricLog, Series, is_bad
from lit_stability.checks.metric_log.timeline import Timeline
from lit_stability.detectors.anomaly import Anomaly
from lit_stability.detectors.spike import Spike

_RATIO, _SIGMAS, _JUMP = 2.0, 8.0, 1.5
"""Options of the spike detector. A loss spike is smaller than a gradient spike, as logs often have
means over many steps."""
_APART = 5
"""Points between spikes of one episode."""
_SLOW = 20
"""Points that a spike above the first losses may take to come back before it is a warning."""


def loss_findings(log: MetricLog, timeline: Timeline) -> Iterator[LogFinding]:
    """Returns the findings on the training loss."""
    series = timeline.roles.loss
    yield from _non_finite(log, timeline)
    end = next((i for i, v in enumerate(series.values) if not math.isfinite(v)), len(series))
    if end < len(series) and any(map(math.isfinite, series.values[end:])):
        end = len(series)  # it came back: the whole course counts, without these points
    hidden = _hidden_nan(log, timeline)
    if hidden is not None:
        yield hidden
        end = min(end, timeline.index_of(hidden.step or 0))
    levels = LossLevels.of(series, end)
    diverged = None if levels is None else divergence(levels, timeline)
    if diverged is not None:
        yield diverged
    yield from _spikes(timeline, end, before=None if diverged is None else diverged.step)
    if levels is not None and diverged is None:
        unlearnt = no_learning(levels, timeline)
        if unlearnt is not None:
            yield unlearnt


def _non_finite(log: MetricLog, timeline: Timeline) -> Iterator[LogFinding]:
    series = timeline.roles.loss
    bad = [i for i, value in enumerate(series.values) if not math.isfinite(value)]
    if not bad:
        return
    start = series.tail(is_bad)
    lasts = start < len(series)
    first = start if lasts else bad[0]
    value, step = series.values[first], series.steps[first]
    anomaly = Anomaly(
        kind="non-finite loss", step=step, value=value, signal="loss", message=f"loss is {value}"
    )
    causes = causes_of(anomaly, timeline, first)
    before = (
        f"it was {series.values[first - 1]:.4g} at step {series.steps[first - 1]}" if first else ""
    )
    if lasts:
        why = f"the loss is {value} from this step to the end, at {len(series) - first} points"
    else:
        why = f"{len(bad)} of {len(series)} points are NaN or Inf, and it came back each time"
    also = _first_others(log, series, step)
    yield LogFinding(
        severity="error" if lasts else "warning",
        check="loss",
        what=f"non-finite loss at step {step}",
        where=(series.name,),
        why="; ".join(filter(None, (why, before, also))),
        remedy=causes[0].remedy if causes else "look at the batch and the operations of this step",
        step=step,
        until=None if lasts else series.steps[bad[-1]],
        causes=causes,
    )


def _first_others(log: MetricLog, loss: Series, step: int) -> str:
    """Returns which other metrics became non-finite for good before the loss did."""
    found = []
    for series in log.series.values():
        start = series.tail(is_bad)
        if series.name != loss.name and 0 < start < len(series) and series.steps[start] < step:
            found.append((series.steps[start], series.name))
    return "; ".join(f"{name} was non-finite from step {at} on" for at, name in sorted(found)[:3])


def _hidden_nan(log: MetricLog, timeline: Timeline) -> LogFinding | None:
    """Finds a loss of exactly 0 to the end, which is how some loggers write NaN."""
    series = timeline.roles.loss
    start = series.tail(lambda value: value == 0)
    if not log.hides_nan or start == len(series):
        return None
    step, norms = series.steps[start], timeline.roles.gradient_norm
    bad = None if norms is None else norms.tail(is_bad)
    sure = norms is not None and bad is not None and bad < len(norms)
    if sure and norms is not None and bad is not None:
        # The mean over the first interval may still have finite losses in it.
        step = min(step, norms.steps[bad])
        start = timeline.index_of(step)
    elif len(series) - start < 3:
        return None
    anomaly = Anomaly(
        kind="non-finite loss", step=step, value=math.nan, signal="loss", message="loss is NaN"
    )
    causes = causes_of(anomaly, timeline, start)
    shown = "the gradient norm is NaN or Inf and the loss" if sure else "the loss"
    return LogFinding(
        severity="error",
        check="loss",
        what=f"non-finite loss at step {step}, hidden by the logger",
        where=(series.name,),
        why=f"{shown} is exactly 0 to the end: with logging_nan_inf_filter=True the Trainer "
        "writes that in place of NaN",
        remedy=f"set logging_nan_inf_filter=False; {causes[0].remedy}"
        if causes
        else "set logging_nan_inf_filter=False, and look at the batch of this step",
        step=step,
        certainty="certain" if sure else "likely",
        causes=causes,
    )


def _spikes(timeline: Timeline, end: int, before: int | None) -> Iterator[LogFinding]:
    """Finds losses far above the ones around them, and whether each came back."""
    series = timeline.roles.loss
    detector = Spike("loss", ratio=_RATIO, sigmas=_SIGMAS, jump=_JUMP)
    episodes: list[list[tuple[int, Anomaly]]] = []
    for stats in timeline.losses():
        if stats.step >= end or (before is not None and series.steps[stats.step] >= before):
            break
        anomaly = detector.check(stats)
        if anomaly is None:
            detector.update(stats)
        elif episodes and stats.step - episodes[-1][-1][0] <= _APART:
            episodes[-1].append((stats.step, anomaly))
        else:
            episodes.append([(stats.step, anomaly)])
    if not episodes:
        return
    returns = [_return(series, end, episode) for episode in episodes]
    lasted = [at - e[0][0] for at, e in zip(returns, episodes, strict=True) if at is not None]
    index, worst = max((each for e in episodes for each in e), key=lambda each: each[1].value)
    at, usual = series.steps[index], worst.baseline or 0.0
    left = end - 1 - episodes[-1][-1][0]
    stays = None in returns and left >= _APART
    slow = stays or max(lasted, default=0) > _SLOW
    if stays:
        kept = f"at the {left} points after the last one it did not come back"
    elif None in returns:
        kept = f"the log ends {left} point{'s' if left != 1 else ''} after the last one"
    else:
        kept = f"it came back within {max(lasted)} point{'s' if max(lasted) > 1 else ''}"
    shown = Anomaly(
        kind="loss spike", step=at, value=worst.value, signal="loss",
        message=f"loss {worst.value:.4g}, usual {usual:.4g}",
    )  # fmt: skip
    causes = causes_of(shown, timeline, index)
    count = f"{len(episodes)} loss spikes" if len(episodes) > 1 else "a loss spike"
    yield LogFinding(
        severity="warning" if slow and worst.value > median(series.values[:5]) else "note",
        check="loss",
        what=f"{count}, the largest at step {at}" if len(episodes) > 1 else f"{count} at step {at}",
        where=(series.name,),
        why=f"the loss was {worst.value:.4g}, {worst.value / usual:.1f} times the median before "
        f"it; {kept}",
        remedy=causes[0].remedy if causes else "clip gradients, or look at the batch of this step",
        step=series.steps[episodes[0][0][0]],
        until=series.steps[episodes[-1][-1][0]],
        causes=causes,
    )


def _return(series: Series, end: int, episode: Sequence[tuple[int, Anomaly]]) -> int | None:
    """Returns the index of the first loss after an episode that is not high, None if all are."""
    bound = episode[0][1].threshold or math.inf
    after = range(episode[-1][0] + 1, end)
    return next((i for i in after if series.values[i] <= bound), None)
