"""Finds a loss that rose for good, and one that never fell.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math

from lit_stability.checks.finding import Severity
from lit_stability.checks.metric_log.causes import causes_of
from lit_stability.checks.metric_log.loss_levels import FEWEST, LossLevels
from lit_stability.checks.metric_log.report import LogFinding
from lit_stability.checks.metric_log.timeline import Timeline
from lit_stability.detectors.anomaly import Anomaly
from lit_stability.detectors.trends import LossTrend

_LOST = 0.25
"""Share of what was learnt whose loss is a warning; all of it is an error."""
_HUNDREDFOLD = 100.0
"""Factor over the lowest level that is a warning, whatever share of the first loss it is."""
_RUNAWAY = 1000.0
"""Factor over the first losses that is an error in a run that never learnt."""
_ROSE = 10.0
"""Factor over the first losses to which a loss that learnt nothing has risen if it diverged."""
_LONG = 200
"""Steps that a run needs before it can be blamed for having learnt nothing."""
_CHANCES = (2, 10, 100, 1000)
"""Numbers of classes whose chance level ``ln(classes)`` is recognised."""


def divergence(levels: LossLevels, timeline: Timeline) -> LogFinding | None:
    """Finds a loss that rose above its lowest level and did not come back."""
    lowest, first, last = min(levels.medians), levels.first, levels.last
    threshold = levels.threshold()
    onset = levels.onset(threshold)
    if onset is None:
        return None
    judged = _judge(levels, starts_high=onset == 0 or first <= threshold)
    if judged is None:
        return None
    severity, text, falls = judged
    series, index = timeline.roles.loss, levels.places[onset]
    step = series.steps[index]
    rising = max(onset, min(len(levels.values) - 1, onset + levels.width // 2))
    anomaly = Anomaly(
        kind="change of regime" if falls else "divergence", step=step, value=last, signal="loss",
        message=f"the loss rose from {lowest:.4g} and stayed high",
    )  # fmt: skip
    causes = causes_of(anomaly, timeline, levels.places[rising])
    return LogFinding(
        severity=severity,
        check="loss",
        what=f"divergence from step {step} on",
        where=(series.name,),
        why=f"the loss rose from its lowest level of {lowest:.4g} and did not come back: its level "
        f"at the end is {last:.4g}, {text}",
        remedy=causes[0].remedy if causes else "lower the learning rate, or clip gradients",
        step=step,
        certainty="certain" if severity == "error" else "likely",
        causes=causes,
    )


def _judge(levels: LossLevels, *, starts_high: bool) -> tuple[Severity, str, bool] | None:
    """Judges a rise.

    Returns:
        Its severity, what the level at the end is compared with, and whether the loss falls again;
        None if it is no finding.

    Args:
        levels: Of the loss.
        starts_high: Whether the loss never was lower than in its first steps.
    """
    lowest, first, last = min(levels.medians), levels.first, levels.last
    learnt = first - lowest
    lost = (last - lowest) / learnt if learnt > 0 else math.inf
    before = f"and {first:.4g} in the first steps"
    if min(levels.values) < 0:
        # Such as the loss of an adversary or a policy, which does not have to fall.
        return "note", f"{before}; it is negative at times, so healthy runs do that too", False
    falls = last < max(levels.medians[levels.medians.index(lowest) :]) / 2
    if starts_high:
        severity: Severity = "error" if last >= _RUNAWAY * first > 0 else "warning"
        return None if falls else (severity, before, False)
    if lost >= 1 and falls:
        # Such as data that became harder at once: the loss is learnt again.
        return "warning", "no better than the first losses, but it falls again", True
    if lost >= 1:
        return "error", "which is no better than the first losses", False
    if lost >= _LOST or last >= _HUNDREDFOLD * lowest > 0:
        return "warning", f"so {lost:.0%} of what was learnt is lost", falls
    return None


def no_learning(levels: LossLevels, timeline: Timeline) -> LogFinding | None:
    """Finds a loss that never fell below its first values."""
    series = timeline.roles.loss
    points = len(levels.values)
    if points < 4 * FEWEST or series.steps[-1] - series.steps[0] < _LONG or levels.first <= 0:
        return None
    trend = LossTrend(block=levels.width)
    for value in levels.values:
        trend.update(value)
    start, peak = min(levels.values[:3]), max(levels.medians)
    if trend.learnt and (start <= 0 or min(levels.medians) < start):
        return None
    classes = [k for k in _CHANCES if abs(levels.last - math.log(k)) < 0.005 * math.log(k)]
    chance = f", about ln({classes[0]}): a guess among {classes[0]} classes" if classes else ""
    rose = peak >= _ROSE * start > 0 and min(levels.values) >= 0
    highest = levels.medians.index(peak) + levels.width // 2
    index = levels.places[highest] if rose else len(series) - 1
    anomaly = Anomaly(
        kind="divergence" if rose else "no learning", step=series.steps[index], value=levels.last,
        signal="loss", message=f"the loss never fell below {start:.4g}",
    )  # fmt: skip
    up = f"its level rose to {peak:.4g} at step {series.steps[index]} and " if rose else ""
    return LogFinding(
        severity="warning" if classes or rose else "note",
        check="loss",
        what="no learning",
        where=(series.name,),
        why=f"the loss never fell for long below its first values of {start:.4g}; {up}it ends at "
        f"{levels.last:.4g}{chance}",
        remedy="run `lit-stability check`: labels, masks, trainable parameters; then the learning "
        "rate. Nothing, if the run began with trained weights",
        step=series.steps[index] if rose else None,
        certainty="likely",
        causes=causes_of(anomaly, timeline, index),
    )
