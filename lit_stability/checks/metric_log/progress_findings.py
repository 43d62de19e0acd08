"""Finds how a run progressed: restarts, gaps, slower steps, and whether it came to its end.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from lit_stability.checks.metric_log.report import LogFinding
from lit_stability.checks.metric_log.series import MetricLog, Series
from lit_stability.checks.metric_log.timeline import Timeline

_GAP = 20.0
"""Factor over the median distance of two points that is a gap."""
_GAP_SECONDS = 600.0
_FEWEST = 30
"""Points needed to judge distances."""
_SLOWER = 1.5
"""Factor by which the time of a step must have grown."""


def progress_findings(log: MetricLog, timeline: Timeline) -> Iterator[LogFinding]:
    """Returns the findings on restarts, gaps, the time of steps and the end of the run."""
    yield from _restarts(timeline.roles.every_loss)
    yield from _gaps(timeline.roles.loss)
    yield from _step_time(timeline.roles.loss)
    yield from _end(log, timeline)


def _restarts(series: Series) -> Iterator[LogFinding]:
    parts = [*series.attempts()]
    if len(parts) < 2:
        return
    jumps = [(series.steps[end - 1], series.steps[end]) for _, end in parts[:-1]]
    shown = ", ".join(f"from {before} to {after}" for before, after in jumps[:3])
    more = f" and {len(jumps) - 3} more" if len(jumps) > 3 else ""
    last, start = jumps[-1]
    yield LogFinding(
        severity="note",
        check="progress",
        what="steps that go back",
        where=(series.name,),
        why=f"the step went back {shown}{more}: the run was resumed, or another one was written to "
        "the same folder; what the later attempt replaced does not count",
        remedy="nothing, if it was resumed; give every run its own folder",
        step=start,
        until=last,
    )
    for (first, end), (_, after) in zip(parts[:-1], jumps, strict=True):
        lost = next((i for i in range(first, end) if not math.isfinite(series.values[i])), None)
        if lost is not None and series.steps[lost] >= after:
            yield LogFinding(
                severity="warning",
                check="loss",
                what=f"non-finite loss at step {series.steps[lost]}, before a restart",
                where=(series.name,),
                why=f"the loss was {series.values[lost]}; the run went on from step {after}",
                remedy="if it recurs at the same step, look at its batch; if not, at the learning "
                "rate",
                step=series.steps[lost],
            )


def _gaps(series: Series) -> Iterator[LogFinding]:
    if len(series) < _FEWEST:
        return
    for values, unit, least in ((series.steps, "steps", 0.0), (series.times, "s", _GAP_SECONDS)):
        widest, at, usual = _widest(values)
        if at is not None and widest > max(_GAP * usual, least):
            yield LogFinding(
                severity="note",
                check="progress",
                what=f"a gap in the log after step {series.steps[at]}",
                where=(series.name,),
                why=f"the next point is {widest:.6g} {unit} later, usual are {usual:.3g}",
                remedy="nothing, if the run was suspended or resumed there",
                step=series.steps[at],
                until=series.steps[at + 1],
            )


def _widest(values: array[int] | array[float]) -> tuple[float, int | None, float]:
    """Returns the widest distance of two neighbours, the index of the first, and the median."""
    distances = array("d", (b - a for a, b in pairwise(values)))
    known = [d for d in distances if d > 0]
    if len(known) < _FEWEST - 1:
        return 0.0, None, 0.0
    widest = max(known)
    return widest, distances.index(widest), median(known)


def _step_time(series: Series) -> Iterator[LogFinding]:
    """Compares the median seconds a step in thirds of the run: it must have grown in each."""
    points = len(series)
    if points < 3 * _FEWEST or not math.isfinite(series.times[0]):
        return
    third = points // 3
    times = [_seconds(series, i * third, (i + 1) * third) for i in range(3)]
    if not 0 < times[0] < times[1] < times[2] or times[2] < _SLOWER * times[0]:
        return
    yield LogFinding(
        severity="note",
        check="progress",
        what="steps take longer and longer",
        where=(series.name,),
        why=f"a step took {times[0]:.3g} s in the first third of the run, {times[1]:.3g} s in the "
        f"second and {times[2]:.3g} s in the last",
        remedy="look for a list or graph that grows with each step, for memory that is swapped, "
        "for slower storage, and for other programs on the machine",
        step=series.steps[third],
        certainty="likely",
    )


def _seconds(series: Series, start: int, end: int) -> float:
    steps, times = series.steps[start:end], series.times[start:end]
    found = [
        (times[i + 1] - times[i]) / (steps[i + 1] - steps[i])
        for i in range(len(steps) - 1)
        if steps[i + 1] > steps[i] and math.isfinite(times[i + 1] - times[i])
    ]
    return median(found) if found else 0.0


def _end(log: MetricLog, timeline: Timeline) -> Iterator[LogFinding]:
    last = timeline.roles.loss.steps[-1]
    if log.exit_code:
        yield LogFinding(
            severity="warning",
            check="progress",
            what=f"the run ended with exit code {log.exit_code}",
            why="the program raised an exception, or was interrupted",
            remedy="look at the end of its output",
            step=last,
        )
    elif log.complete is False:
        of = f" of {log.planned_steps}" if log.planned_steps else ""
        yield LogFinding(
            severity="note",
            check="progress",
            what=f"the log ends at step {last}{of}, without the end of the run",
            why="the run is still going, was killed, or this is the state of a checkpoint",
            remedy="if it is not running, look at the end of its output, and for a lack of memory",
            step=last,
        )
