"""Tables of the corpus: figures by protection, and every run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import quantiles

from benchmarks.corpus.scores import Run, Score
from benchmarks.rescue.report import by_family, everything
from benchmarks.results import Table


def tables(
    runs: Mapping[str, Sequence[Run]], scores: Mapping[str, Score], raises_alarms: Collection[str]
) -> list[Table]:
    """Creates all tables.

    Args:
        runs: Runs by the name of the protection.
        scores: Figures by the name of the protection.
        raises_alarms: Protections that raise alarms; the others have a dash in those columns.
    """
    verdicts = [run.verdict for group in runs.values() for run in group]
    entries = next(iter(runs.values()))
    return [
        failing(scores, raises_alarms),
        healthy(scores, raises_alarms),
        by_family(verdicts),
        everything(verdicts),
        lost_at(entries),
    ]


def failing(scores: Mapping[str, Score], raises_alarms: Collection[str]) -> Table:
    """Creates the table of the runs that fail."""
    columns = ["protection", "saved", "saved where bare is lost", "lost where bare is saved"]
    columns += ["recall, alarms", "alarm only later", "recall, alarms or changed updates"]
    columns += ["lead time of alarms, quartiles", "of diverging runs"]
    rows = [
        [
            *(name, str(s.saved), str(s.saved_of_lost), str(s.lost_of_saved)),
            *_alarms(name in raises_alarms, str(s.noticed), str(s.noticed_later)),
            str(s.noticed_or_acted_on),
            *_alarms(
                name in raises_alarms,
                _quartiles(s.leads),
                f"{len(s.leads)}/{s.failing_visibly}",
            ),
        ]
        for name, s in scores.items()
    ]
    return Table("Runs that fail", columns, rows)


def healthy(scores: Mapping[str, Score], raises_alarms: Collection[str]) -> Table:
    """Creates the table of the healthy runs."""
    columns = ["protection", "steps", "false alarms", "per 1,000 steps (95 % bound)"]
    columns += ["runs with an alarm", "updates changed per 1,000 steps"]
    columns += ["clipped at 1.0 per 1,000 steps", "bit-identical runs"]
    columns += ["more than 5 % worse", "more than 5 % better", "not finished"]
    rows = [
        [
            *(name, f"{s.healthy_steps:,}"),
            *_alarms(
                name in raises_alarms,
                str(s.alarms),
                f"{s.per_thousand(s.alarms):.2f} (< {s.alarm_bound:.2f})",
                str(s.with_alarm),
            ),
            f"{s.per_thousand(s.changed):.1f}",
            *(f"{s.per_thousand(s.clipped):.1f}", str(s.identical)),
            *(str(s.worse), str(s.better), str(s.unfinished)),
        ]
        for name, s in scores.items()
    ]
    return Table("Healthy runs", columns, rows)


def lost_at(runs: Sequence[Run]) -> Table:
    """Creates the table of the steps at which unprotected runs fail, here and in the corpus."""
    columns = ["run", "cause", "fault", "lost", "lost in the corpus file"]
    rows = [
        [
            *(run.entry.id, run.entry.cause, _step(run.entry.fault)),
            *(_step(run.bare.lost), _step(run.entry.lost)),
        ]
        for run in runs
        if not run.entry.healthy
    ]
    return Table("Where the unprotected runs are lost", columns, rows)


def _alarms(has_alarms: bool, *cells: str) -> list[str]:
    return [*cells] if has_alarms else ["-"] * len(cells)


def _step(step: int | None) -> str:
    return "-" if step is None else str(step)


def _quartiles(leads: Sequence[int]) -> str:
    """Formats the quartiles.

    >>> _quartiles([]), _quartiles([4]), _quartiles([1, 2, 3, 4, 5])
    ('-', '4', '2 / 3 / 4')
    """
    if len(leads) < 2:
        return str(leads[0]) if leads else "-"
    return " / ".join(f"{q:.0f}" for q in quantiles(leads, n=4, method="inclusive"))
