"""Computes the figures of a protection from its records and those of the unprotected runs.

Processes data only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.corpus.entries import Entry
from benchmarks.corpus.records import Record
from benchmarks.prediction.report import EARLIEST
from benchmarks.rescue.judge import TOLERANCE, Verdict


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run with a protection, beside the same run without one."""

    entry: Entry
    record: Record
    bare: Record
    verdict: Verdict
    bare_verdict: Verdict

    @property
    def bare_is_lost(self) -> bool:
        """Whether the unprotected run fails and ends worse than its twin."""
        return not self.entry.healthy and not self.bare_verdict.saved

    @property
    def window(self) -> tuple[int, int]:
        """First and last batch at which an alarm notices that this run fails.

        It ends where the unprotected run is lost, or with that run if its loss does not show it.
        It begins at the injected fault, or 40 batches before the end of the window.
        """
        lost = self.bare.lost
        end = self.bare.outcome.batches - 1 if lost is None else lost
        if self.entry.fault is not None:
            return self.entry.fault, max(end, self.entry.fault)
        return (0 if lost is None else max(0, end - EARLIEST)), end

    @property
    def first_alarm(self) -> int | None:
        """Batch of the first alarm in the window."""
        first, last = self.window
        return next((a for a in self.record.outcome.alarms if first <= a <= last), None)

    @property
    def acted_on(self) -> bool:
        """Whether an update in the window was changed beyond plain clipping."""
        first, last = self.window
        return any(first <= batch <= last for batch in self.changed)

    @property
    def lead(self) -> int | None:
        """Batches from the first alarm in the window to the loss, if a run fails by itself."""
        measurable = self.entry.fault is None and self.bare.lost is not None
        if not measurable or self.first_alarm is None:
            return None
        return self.window[1] - self.first_alarm

    @property
    def noticed(self) -> bool:
        """Whether there is an alarm in the window."""
        return self.first_alarm is not None

    @property
    def noticed_later(self) -> bool:
        """Whether there are alarms after the window and none in it."""
        alarms = self.record.outcome.alarms
        return not self.noticed and any(alarm > self.window[1] for alarm in alarms)

    @property
    def changed(self) -> frozenset[int]:
        """Batches whose update was changed beyond plain clipping, by this protection."""
        return frozenset(self.record.changed) - frozenset(self.bare.changed)

    @property
    def clipped(self) -> frozenset[int]:
        """Batches whose gradient was only clipped to a norm of 1.0, by this protection."""
        return frozenset(self.record.clipped) - frozenset(self.bare.clipped)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Some of a number of runs."""

    count: int
    total: int

    def __str__(self) -> str:
        return f"{self.count}/{self.total}" if self.total else "-"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Figures of a protection."""

    saved: Share
    """Of the runs with a fault, and of those that are unstable or diverge."""
    saved_of_lost: Share
    """Of those, the ones that are lost without protection."""
    lost_of_saved: Share
    """Of the others, those that are lost with the protection."""
    noticed: Share
    """Runs with an alarm in their window, of all that are lost without protection."""
    noticed_later: Share
    """Runs whose first alarm comes after their window."""
    noticed_or_acted_on: Share
    """Runs with an alarm or a changed update in their window."""
    leads: tuple[int, ...]
    """Batches from alarm to loss, of the noticed runs that fail by themselves and visibly."""
    failing_visibly: int
    """Number of these runs, noticed or not."""
    healthy_steps: int
    """Batches of all healthy runs."""
    alarms: int
    """Alarms in healthy runs."""
    alarm_bound: float
    """Upper bound of the alarms per 1,000 healthy batches; see `upper_bound`."""
    with_alarm: Share
    """Healthy runs with an alarm."""
    changed: int
    """Healthy batches whose update was changed beyond plain clipping."""
    clipped: int
    """Healthy batches whose gradient was only clipped to a norm of 1.0."""
    identical: Share
    """Healthy runs that end bit-identical to the unprotected ones."""
    worse: int
    """Healthy runs that finish with a loss more than 5 % above the unprotected one."""
    better: int
    """The same below it."""
    unfinished: int
    """Healthy runs that were stopped or failed."""

    def per_thousand(self, count: float) -> float:
        """Returns a count in healthy runs per 1,000 batches."""
        return 1000 * count / self.healthy_steps if self.healthy_steps else math.nan


def score(runs: Sequence[Run]) -> Score:
    """Computes the figures of one protection."""
    healthy = [run for run in runs if run.entry.healthy]
    failing = [run for run in runs if not run.entry.healthy]
    lost = [run for run in failing if run.bare_is_lost]
    steps = sum(run.record.outcome.batches for run in healthy)
    alarms = sum(len(run.record.outcome.alarms) for run in healthy)
    leads = [run.lead for run in lost if run.lead is not None]
    visible = [run for run in lost if run.entry.fault is None and run.bare.lost is not None]
    finished = [run for run in healthy if run.record.outcome.ended == "finished"]
    return Score(
        saved=_share(run.verdict.saved for run in failing),
        saved_of_lost=_share(run.verdict.saved for run in lost),
        lost_of_saved=_share(not run.verdict.saved for run in failing if not run.bare_is_lost),
        noticed=_share(run.noticed for run in lost),
        noticed_later=_share(run.noticed_later for run in lost),
        noticed_or_acted_on=_share(run.noticed or run.acted_on for run in lost),
        leads=tuple(sorted(leads)),
        failing_visibly=len(visible),
        healthy_steps=steps,
        alarms=alarms,
        alarm_bound=1000 * upper_bound(alarms) / steps if steps else math.nan,
        with_alarm=_share(bool(run.record.outcome.alarms) for run in healthy),
        changed=sum(len(run.changed) for run in healthy),
        clipped=sum(len(run.clipped) for run in healthy),
        identical=_share(run.verdict.untouched for run in healthy),
        worse=sum(not run.verdict.saved for run in finished),
        better=sum(_better(run) for run in finished),
        unfinished=len(healthy) - len(finished),
    )


def _share(tests: Iterable[bool]) -> Share:
    results = list(tests)
    return Share(count=sum(results), total=len(results))


def _better(run: Run) -> bool:
    loss, reference = run.record.outcome.loss, run.bare.outcome.loss
    if loss is None or reference is None:
        return False
    return loss < reference - (TOLERANCE - 1) * abs(reference)


def upper_bound(count: int, level: float = 0.95) -> float:
    """Returns the one-sided upper bound of a Poisson mean, given one count.

    It is the mean with which so few events or fewer have a probability of ``1 - level``.

    >>> [round(upper_bound(n), 2) for n in (0, 1, 10)]
    [3.0, 4.74, 16.96]
    """
    low, high = float(count), 10.0 + 3 * count
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        terms = (i * math.log(middle) - math.lgamma(i + 1) - middle for i in range(count + 1))
        low, high = (middle, high) if sum(map(math.exp, terms)) > 1 - level else (low, middle)
    return high
