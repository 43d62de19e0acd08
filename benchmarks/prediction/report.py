"""Evaluates alarms: lead time, recall, false alarms and calibration, with two baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, quantiles

from benchmarks.prediction.families import CALM
from benchmarks.prediction.traces import Trace
from benchmarks.results import Table
from lit_stability.detectors import Divergence, flagged
from lit_stability.policies.crash_risk import HORIZON, CrashRisk

LEVELS = (0.3, 0.5, 0.7, 0.9)
EARLIEST = 40
"""Number of steps before the onset in which an alarm announces it; earlier ones are ignored."""

Alarms = Callable[[Trace], list[int]]
"""Returns the steps before the onset of a run at which an alarm is raised."""


def risks(trace: Trace) -> Iterator[tuple[int, float]]:
    """Yields step and risk of each accepted step before the onset."""
    risk, onset = CrashRisk(), trace.onset()
    for stats, accepted in zip(trace.stats()[:onset], trace.accepted[:onset], strict=True):
        if accepted:
            yield stats.step, risk.update(stats)


def risk_alarms(level: float) -> Alarms:
    """Returns the alarm that is raised if the risk reaches a level."""
    return lambda trace: [step for step, risk in risks(trace) if risk >= level]


def divergence_alarms(trace: Trace) -> list[int]:
    """Alarms of the suite's detector `Divergence`, run alone."""
    detector = Divergence()
    return [s.step for s in trace.stats()[: trace.onset()] if flagged(detector, s)]


def rising_loss_alarms(trace: Trace) -> list[int]:
    """Alarms if the loss rose five times in a row or exceeds twice the mean of the last 100."""
    losses, alarms = trace.loss[: trace.onset()], []
    for step in range(20, len(losses)):
        last, past = losses[step - 5 : step + 1], losses[max(0, step - 100) : step]
        rising = all(a < b for a, b in pairwise(last))
        if rising or losses[step] > 2 * mean(past):
            alarms.append(step)
    return alarms


ALARMS: dict[str, Alarms] = {
    **{f"risk >= {level}": risk_alarms(level) for level in LEVELS},
    "`Divergence`": divergence_alarms,
    "rises 5 times, or 2 x mean": rising_loss_alarms,
}


@dataclass(frozen=True)
class AlarmQuality:
    """Lead times and false alarms of an alarm on a set of runs."""

    leads: tuple[int, ...]
    """Steps from the first alarm to the onset, of each run that diverged; 0 without an alarm."""
    false: int
    """Alarms in runs that do not diverge; alarms within 20 steps of the previous one count once."""
    steps: int
    """Steps of the runs that do not diverge."""

    def recall(self, min_lead: int = 1) -> float:
        """Returns the share of divergences announced at least `min_lead` steps before."""
        return mean(lead >= min_lead for lead in self.leads) if self.leads else math.nan

    def cells(self) -> list[str]:
        """Formats recall, recall ten steps ahead, quartiles of the lead, and false alarms."""
        announced = [lead for lead in self.leads if lead]
        quartiles = (
            quantiles(announced, n=4, method="inclusive")
            if len(announced) > 1
            else [*announced * 3]
        )
        lead = " / ".join(f"{q:.0f}" for q in quartiles) or "-"
        rate = f"{1000 * self.false / self.steps:.2f}" if self.steps else "-"
        recalls = [f"{r:.0%}" if r == r else "-" for r in (self.recall(), self.recall(10))]
        return [*recalls, lead, rate]


def evaluate(alarms: Alarms, traces: Sequence[Trace]) -> AlarmQuality:
    """Evaluates an alarm on runs, some of which diverge."""
    leads, false, steps = [], 0, 0
    for trace in traces:
        raised, onset = alarms(trace), trace.onset()
        if onset is not None:
            leads.append(onset - next((s for s in raised if s >= onset - EARLIEST), onset))
            continue
        steps += len(trace.loss)
        false += sum(b - a > HORIZON for a, b in zip([-math.inf, *raised], raised, strict=False))
    return AlarmQuality(tuple(leads), false, steps)


def quality_of_alarms(traces: Sequence[Trace]) -> dict[str, dict[str, AlarmQuality]]:
    """Evaluates each alarm on all runs and on the runs of the calm families."""
    calm = [trace for trace in traces if trace.family in CALM]
    return {
        name: {"all": evaluate(alarms, traces), "calm": evaluate(alarms, calm)}
        for name, alarms in ALARMS.items()
    }


def alarm_table(qualities: Mapping[str, Mapping[str, AlarmQuality]]) -> Table:
    """Creates the table with one row per alarm."""
    columns = ["alarm", "announced", "10 steps ahead", "lead, quartiles"]
    rows = [[name, *q["all"].cells(), q["calm"].cells()[-1]] for name, q in qualities.items()]
    return Table("by alarm", [*columns, "false, all runs", "false, calm"], rows)


def quality_of_families(traces: Sequence[Trace], level: float = 0.5) -> dict[str, AlarmQuality]:
    """Evaluates the risk at one level, for families with a divergence or a false alarm."""
    qualities = {
        family: evaluate(risk_alarms(level), [t for t in traces if t.family == family])
        for family in dict.fromkeys(trace.family for trace in traces)
    }
    return {family: q for family, q in qualities.items() if q.leads or q.false}


def family_table(qualities: Mapping[str, AlarmQuality]) -> Table:
    """Creates the table with one row per family."""
    columns = ["family", "diverged", "announced", "10 steps ahead", "lead, quartiles", "false"]
    rows = [[family, str(len(q.leads)), *q.cells()] for family, q in qualities.items()]
    return Table("by family, risk >= 0.5", columns, rows)


def calibration(pairs: Sequence[tuple[float, float]]) -> list[tuple[str, int, float, float]]:
    """Returns risk bin, number of samples, mean risk and observed share of each bin.

    Args:
        pairs: Risk of a sample, and 1.0 if a divergence began within 20 steps, else 0.0.
    """
    edges, bins = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01), []
    for low, high in pairwise(edges):
        inside = [pair for pair in pairs if low <= pair[0] < high]
        if inside:
            risk, share = (mean(values) for values in zip(*inside, strict=True))
            bins.append((f"{low:g} to {min(high, 1):g}", len(inside), risk, share))
    return bins


def calibration_table(title: str, bins: Sequence[tuple[str, int, float, float]]) -> Table:
    """Creates the table with one row per bin."""
    columns = ["risk", "samples", "mean risk", "share with a divergence within 20 steps"]
    return Table(title, columns, [[b, str(n), f"{r:.2f}", f"{s:.2f}"] for b, n, r, s in bins])
