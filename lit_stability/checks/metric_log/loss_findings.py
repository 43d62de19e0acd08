"""Finds what went wrong with the training loss: NaN, divergence, spikes, nothing learnt.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from lit_stability.checks.finding import Severity
from lit_stability.checks.metric_log.causes import causes_of
from lit_stability.checks.metric_log.report import LogFinding
from lit_stability.checks.metric_log.series import MetricLog, Series
from lit_stability.checks.metric_log.timeline import Timeline
from lit_stability.detectors.anomaly import Anomaly
from lit_stability.detectors.divergence import Divergence
from lit_stability.detectors.rolling_window import Window
from lit_stability.detectors.spike import Spike
from lit_stability.detectors.trends import ROUNDING, LossTrend

_RULE = Divergence()
"""What counts as a rise is the same as in a live run."""
_FEWEST = 10
"""Finite losses needed to judge their course."""
_LOST = 0.25
"""Share of what was learnt whose loss is a warning; all of it is an error."""
_HUNDREDFOLD = 100.0
"""Factor over the lowest level that is a warning, whatever share of the first loss it is."""
_RUNAWAY = 1000.0
"""Factor over the first losses that is an error in a run that never learnt."""
_ROSE = 10.0
"""Factor over the first losses to which a loss that learnt nothing has risen if it diverged."""
_RATIO, _SIGMAS, _JUMP = 2.0, 8.0, 1.5
"""Options of the spike detector. A loss spike is smaller than a gradient spike, as logs often have
means over many steps."""
_APART = 5
"""Points between spikes of one episode."""
_SLOW = 20
"""Points that a spike may take to come back before it is a warning."""
_LONG = 200
"""Steps that a run needs before it can be blamed for having learnt nothing."""
_CHANCES = (2, 10, 100, 1000)
"""Numbers of classes whose chance level ``ln(classes)`` is recognised."""


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
    course = _Course.of(series, end)
    diverged = None if course is None else _divergence(course, timeline)
    if diverged is not None:
        yield diverged
    yield from _spikes(timeline, end, before=None if diverged is None else diverged.step)
    if course is not None and diverged is None:
        yield from _unlearnt(course, timeline)


def _non_finite(log: MetricLog, timeline: Timeline) -> Iterator[LogFinding]:
    series = timeline.roles.loss
    bad = [i for i, value in enumerate(series.values) if not math.isfinite(value)]
    if not bad:
        return
    start = bad[-1]
    while start > 0 and not math.isfinite(series.values[start - 1]):
        start -= 1
    lasts = bad[-1] == len(series) - 1
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
        values = series.values
        if series.name == loss.name or not values or math.isfinite(values[-1]):
            continue
        i = len(values) - 1
        while i > 0 and not math.isfinite(values[i - 1]):
            i -= 1
        if i > 0 and series.steps[i] < step:
            found.append((series.steps[i], series.name))
    return "; ".join(f"{name} was non-finite from step {at} on" for at, name in sorted(found)[:3])


def _hidden_nan(log: MetricLog, timeline: Timeline) -> LogFinding | None:
    """Finds a loss of exactly 0 to the end, which is how some loggers write NaN."""
    series = timeline.roles.loss
    if not log.hides_nan or not len(series) or series.values[-1] != 0:
        return None
    i = len(series) - 1
    while i > 0 and series.values[i - 1] == 0:
        i -= 1
    # The mean over the first interval may still have finite losses in it.
    norms = timeline.roles.gradient_norm
    sure = norms is not None and len(norms) > 0 and not math.isfinite(norms.values[-1])
    if not sure and len(series) - i < 3:
        return None
    step = series.steps[i]
    if sure and norms is not None:
        bad = len(norms) - 1
        while bad > 0 and not math.isfinite(norms.values[bad - 1]):
            bad -= 1
        step = min(step, norms.steps[bad])
        i = timeline.index_of(step)
    anomaly = Anomaly(
        kind="non-finite loss", step=step, value=math.nan, signal="loss", message="loss is NaN"
    )
    causes = causes_of(anomaly, timeline, i)
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


@dataclass(frozen=True)
class _Course:
    """The course of the loss as medians over a window, up to its first lasting NaN."""

    values: Sequence[float]
    """Finite losses."""
    places: Sequence[int]
    """Index of each in the series."""
    medians: Sequence[float]
    """Median of the window that ends at each value, from the first whole window on."""
    width: int
    """Points in a window."""

    @classmethod
    def of(cls, series: Series, end: int) -> _Course | None:
        places = [i for i in range(end) if math.isfinite(series.values[i])]
        if len(places) < _FEWEST:
            return None
        values = [series.values[i] for i in places]
        width = min(50, max(5, len(values) // 10))
        window, medians = Window(width), []
        for value in values:
            window.add(value)
            if len(window) == width:
                medians.append(window.median)
        return cls(values, places, medians, width)

    @property
    def first(self) -> float:
        """Level of the first losses."""
        return median(self.values[:5])

    @property
    def last(self) -> float:
        """Level of the last losses."""
        return self.medians[-1]

    def threshold(self) -> float:
        """Loss that is high beside the lowest level, by the rule of the live detector."""
        lowest = min(self.medians)
        at = self.medians.index(lowest) + self.width
        steps = [abs(b - a) for a, b in pairwise(self.values[max(0, at - 200) : at])]
        sigma = 1.4826 * median(steps) / math.sqrt(2)
        floor = max(_RULE.floor * max(map(abs, self.medians)), ROUNDING)
        return lowest + max(_RULE.rise * abs(lowest), _RULE.sigmas * sigma, floor)

    def onset(self, threshold: float) -> int | None:
        """Returns the index of the first value of the rise that stays; None if there is none."""
        if self.last <= threshold:
            return None
        at = len(self.medians) - 1
        while at > 0 and self.medians[at - 1] > threshold:
            at -= 1
        if at == 0:
            return 0
        place = at + self.width - 1
        while place > 0 and self.values[place - 1] > threshold:
            place -= 1
        return place


def _divergence(course: _Course, timeline: Timeline) -> LogFinding | None:
    lowest, first, last = min(course.medians), course.first, course.last
    threshold = course.threshold()
    onset = course.onset(threshold)
    if onset is None:
        return None
    severity: Severity
    learnt = first - lowest
    lost = (last - lowest) / learnt if learnt > 0 else math.inf
    grown = last / first if first > 0 else 0.0
    if min(course.values) < 0:
        # Such as the loss of an adversary or a policy, which does not have to fall.
        severity = "warning" if lost >= _ROSE else "note"
        text = f"and {first:.4g} in the first steps; it is negative at times, so healthy runs do "
        text += "that too"
    elif onset == 0 or first <= threshold:
        if last < max(course.medians) / 2:
            return None  # it falls again
        severity = "error" if grown >= _RUNAWAY else "warning"
        text = f"and {first:.4g} in the first steps"
    elif lost >= 1:
        severity, text = "error", "which is no better than the first losses"
    elif lost >= _LOST or (lowest > 0 and last >= _HUNDREDFOLD * lowest):
        severity, text = "warning", f"so {lost:.0%} of what was learnt is lost"
    else:
        return None
    series, index = timeline.roles.loss, course.places[onset]
    step = series.steps[index]
    rising = max(onset, min(len(course.values) - 1, onset + course.width // 2))
    anomaly = Anomaly(
        kind="divergence", step=step, value=last, signal="loss",
        message=f"the loss rose from {lowest:.4g} and stayed high",
    )  # fmt: skip
    causes = causes_of(anomaly, timeline, course.places[rising])
    return LogFinding(
        severity=severity,
        check="loss",
        what=f"divergence from step {step} on",
        where=(series.name,),
        why=f"the loss rose from its lowest level of {lowest:.4g} and did not come back: its level "
        f"at the end is {last:.4g}, {text}",
        remedy=causes[0].remedy if causes else "lower the learning rate, or clip gradients",
        step=step,
        certainty="certain" if severity == "error" and lost >= 1 else "likely",
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
        severity="warning" if stays or max(lasted, default=0) > _SLOW else "note",
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


def _unlearnt(course: _Course, timeline: Timeline) -> Iterator[LogFinding]:
    """Finds a loss that never fell below its first values."""
    series = timeline.roles.loss
    points = len(course.values)
    if points < 4 * _FEWEST or series.steps[-1] - series.steps[0] < _LONG or course.first <= 0:
        return
    trend = LossTrend(block=course.width)
    for value in course.values:
        trend.update(value)
    start, peak = min(course.values[:3]), max(course.medians)
    if trend.learnt and min(course.medians) < start:
        return
    classes = [k for k in _CHANCES if abs(course.last - math.log(k)) < 0.005 * math.log(k)]
    chance = f", about ln({classes[0]}): a guess among {classes[0]} classes" if classes else ""
    rose = peak >= _ROSE * start
    highest = course.medians.index(peak) + course.width // 2
    index = course.places[highest] if rose else len(series) - 1
    anomaly = Anomaly(
        kind="divergence" if rose else "no learning", step=series.steps[index], value=course.last,
        signal="loss", message=f"the loss never fell below {start:.4g}",
    )  # fmt: skip
    up = f"its level rose to {peak:.4g} at step {series.steps[index]} and " if rose else ""
    yield LogFinding(
        severity="warning" if classes or rose else "note",
        check="loss",
        what="no learning",
        where=(series.name,),
        why=f"the loss never fell for long below its first values of {start:.4g}; {up}it ends at "
        f"{course.last:.4g}{chance}",
        remedy="run `lit-stability check`: labels, masks, trainable parameters; then the learning "
        "rate. Nothing, if the run began with trained weights",
        step=series.steps[index] if rose else None,
        certainty="likely",
        causes=causes_of(anomaly, timeline, index),
    )
