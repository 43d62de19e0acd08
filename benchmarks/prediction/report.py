"""What a risk is worth: lead, recall, false alarms, calibration, against two baselines."""

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
"""Steps before the onset from which on an alarm counts for it; one before counts for nothing."""

Alarms = Callable[[Trace], list[int]]
"""From a run to the steps, before its onset, on which the alarm is raised."""


def risks(trace: Trace) -> Iterator[tuple[int, float]]:
    """Step and risk of each accepted step before the onset."""
    risk, onset = CrashRisk(), trace.onset()
    for stats, accepted in zip(trace.stats()[:onset], trace.accepted[:onset], strict=True):
        if accepted:
            yield stats.step, risk.update(stats)


def of_level(level: float) -> Alarms:
    """The risk reaches a level."""
    return lambda trace: [step for step, risk in risks(trace) if risk >= level]


def of_divergence(trace: Trace) -> list[int]:
    """The suite's detector objects; to its own window, whatever other detectors say."""
    detector = Divergence()
    return [s.step for s in trace.stats()[: trace.onset()] if flagged(detector, s)]


def of_rising(trace: Trace) -> list[int]:
    """The loss rose five times in a row, or is twice the mean of the last 100."""
    losses, alarms = trace.loss[: trace.onset()], []
    for step in range(20, len(losses)):
        last, past = losses[step - 5 : step + 1], losses[max(0, step - 100) : step]
        rising = all(a < b for a, b in pairwise(last))
        if rising or losses[step] > 2 * mean(past):
            alarms.append(step)
    return alarms


ALARMS: dict[str, Alarms] = {
    **{f"risk >= {level}": of_level(level) for level in LEVELS},
    "`Divergence`": of_divergence,
    "rises 5 times, or 2 x mean": of_rising,
}


@dataclass(frozen=True)
class Worth:
    """What an alarm is worth on some runs."""

    leads: tuple[int, ...]
    """Steps from the first alarm to the onset, of each run that diverged; 0 without an alarm."""
    false: int
    """Alarms of runs that do not diverge; those within 20 steps of the last count as one."""
    steps: int
    """Of those runs."""

    def recall(self, least: int = 1) -> float:
        """Share of divergences announced at least so many steps before."""
        return mean(lead >= least for lead in self.leads) if self.leads else math.nan

    def cells(self) -> list[str]:
        """Recall, also ten steps ahead, quartiles of the lead where announced, false alarms."""
        known = [lead for lead in self.leads if lead]
        found = quantiles(known, n=4, method="inclusive") if len(known) > 1 else [*known * 3]
        lead = " / ".join(f"{q:.0f}" for q in found) or "-"
        rate = f"{1000 * self.false / self.steps:.2f}" if self.steps else "-"
        recalls = [f"{r:.0%}" if r == r else "-" for r in (self.recall(), self.recall(10))]
        return [*recalls, lead, rate]


def worth(alarms: Alarms, traces: Sequence[Trace]) -> Worth:
    """Of an alarm on runs, diverging and not."""
    leads, false, steps = [], 0, 0
    for trace in traces:
        raised, onset = alarms(trace), trace.onset()
        if onset is not None:
            leads.append(onset - next((s for s in raised if s >= onset - EARLIEST), onset))
            continue
        steps += len(trace.loss)
        false += sum(b - a > HORIZON for a, b in zip([-math.inf, *raised], raised, strict=False))
    return Worth(tuple(leads), false, steps)


def worth_of_alarms(traces: Sequence[Trace]) -> dict[str, dict[str, Worth]]:
    """Of each alarm, on all runs and on those of the calm families alone."""
    calm = [trace for trace in traces if trace.family in CALM]
    return {
        name: {"all": worth(alarms, traces), "calm": worth(alarms, calm)}
        for name, alarms in ALARMS.items()
    }


def alarm_table(found: Mapping[str, Mapping[str, Worth]]) -> Table:
    """A line for each alarm."""
    columns = ["alarm", "announced", "10 steps ahead", "lead, quartiles"]
    rows = [[name, *w["all"].cells(), w["calm"].cells()[-1]] for name, w in found.items()]
    return Table("by alarm", [*columns, "false, all runs", "false, calm"], rows)


def worth_of_families(traces: Sequence[Trace], level: float = 0.5) -> dict[str, Worth]:
    """Of the risk at one level, for the families of which a run diverged or was alarmed for."""
    found = {
        family: worth(of_level(level), [t for t in traces if t.family == family])
        for family in dict.fromkeys(trace.family for trace in traces)
    }
    return {family: w for family, w in found.items() if w.leads or w.false}


def family_table(found: Mapping[str, Worth]) -> Table:
    """A line for each family."""
    columns = ["family", "diverged", "announced", "10 steps ahead", "lead, quartiles", "false"]
    rows = [[family, str(len(w.leads)), *w.cells()] for family, w in found.items()]
    return Table("by family, risk >= 0.5", columns, rows)


def calibration(pairs: Sequence[tuple[float, float]]) -> list[tuple[str, int, float, float]]:
    """Bin of risk, moments in it, mean risk, observed share.

    Args:
        pairs: risk of a moment, and 1.0 where a divergence began within 20 steps.
    """
    edges, bins = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01), []
    for low, high in pairwise(edges):
        inside = [pair for pair in pairs if low <= pair[0] < high]
        if inside:
            risk, share = (mean(each) for each in zip(*inside, strict=True))
            bins.append((f"{low:g} to {min(high, 1):g}", len(inside), risk, share))
    return bins


def calibration_table(title: str, bins: Sequence[tuple[str, int, float, float]]) -> Table:
    """A line for each bin."""
    columns = ["risk", "moments", "mean risk", "followed by a divergence within 20 steps"]
    return Table(title, columns, [[b, str(n), f"{r:.2f}", f"{s:.2f}"] for b, n, r, s in bins])
