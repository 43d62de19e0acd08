"""Summarises verdicts in tables: by protection, by family of faults, and run by run.

Imports `benchmarks.results` for the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from benchmarks.rescue.judge import BARE, Verdict
from benchmarks.rescue.scenario import HEALTHY
from benchmarks.results import Table

Group = Sequence[Verdict]


def share(group: Group, test: Callable[[Verdict], bool]) -> str:
    """Formats how many verdicts pass a test, of how many; a dash for an empty group.

    >>> share([], lambda verdict: True)
    '-'
    """
    return f"{sum(map(test, group))}/{len(group)}" if group else "-"


def middle(values: Iterable[float | None], places: int = 0) -> str:
    """Formats the median of the values that are not None; a dash if there are none.

    >>> middle([3, None, 1, 2])
    '2'
    """
    known = [value for value in values if value is not None]
    return f"{median(known):.{places}f}" if known else "-"


def by_protection(verdicts: Group, raises_alarms: frozenset[str]) -> Table:
    """Creates the table with one row per protection.

    Args:
        verdicts: Verdicts of all runs.
        raises_alarms: Protections that raise alarms.
    """
    columns = ["protection", "saved", "saved where bare is lost", "lost where bare is saved"]
    columns += ["noticed", "after steps", "cause named", "named beyond remedy", "steps lost"]
    columns += ["stopped", "NaN", "failed"]
    faulty = [v for v in verdicts if v.family != HEALTHY]
    bare = {_key(v) for v in faulty if v.outcome.protection == BARE and v.saved}
    groups = _groups(faulty, lambda v: v.outcome.protection).items()
    rows = [_row(name, group, bare, name in raises_alarms) for name, group in groups]
    return Table("What is saved", columns, rows)


def _row(name: str, group: Group, bare: set[tuple[str, int]], raises_alarms: bool) -> list[str]:
    savable = [v for v in group if not v.beyond_remedy]
    beyond_remedy = [v for v in group if v.beyond_remedy and v.named is not None]
    endings = (("stopped",), ("NaN",), ("failed", "hung"))
    return [
        name,
        share(savable, lambda v: v.saved),
        share([v for v in savable if _key(v) not in bare], lambda v: v.saved),
        share([v for v in savable if _key(v) in bare], lambda v: not v.saved),
        share(group, lambda v: v.detected) if raises_alarms else "-",
        middle(v.delay for v in group) if raises_alarms else "-",
        share([v for v in group if v.named is not None], lambda v: bool(v.named)),
        share(beyond_remedy, lambda v: bool(v.named)),
        middle(v.lost for v in savable if v.saved),
        *(str(_count_ended(group, ending)) for ending in endings),
    ]


def _key(verdict: Verdict) -> tuple[str, int]:
    return verdict.outcome.scenario, verdict.outcome.seed


def on_healthy(verdicts: Group, raises_alarms: frozenset[str]) -> Table:
    """Creates the table of the effect of each protection on healthy runs."""
    columns = ["protection", "runs with an alarm", "alarms", "bit-identical runs"]
    columns += ["more than 5 % worse", "not finished", "CPU time"]
    rows = []
    healthy = [v for v in verdicts if v.family == HEALTHY]
    for name, group in _groups(healthy, lambda v: v.outcome.protection).items():
        alarms = sum(v.false_alarms for v in group)
        rows.append(
            [
                name,
                share(group, lambda v: v.false_alarms > 0) if name in raises_alarms else "-",
                str(alarms) if name in raises_alarms else "-",
                share(group, lambda v: v.untouched),
                share(group, lambda v: v.outcome.ended == "finished" and not v.saved),
                share(group, lambda v: v.outcome.ended != "finished"),
                middle((v.slower for v in group), 2),
            ]
        )
    return Table("Effect on healthy runs", columns, rows)


def by_family(verdicts: Group) -> Table:
    """Creates the table of saved runs by family and protection."""
    faulty = [v for v in verdicts if v.family != HEALTHY]
    protections = list(_groups(faulty, lambda v: v.outcome.protection))
    rows = []
    for family, group in _groups(faulty, lambda v: v.family).items():
        cells = _groups(group, lambda v: v.outcome.protection)
        rows.append([family, *(share(cells.get(p, []), lambda v: v.saved) for p in protections)])
    return Table("Saved, by family of faults", ["family", *protections], rows)


def everything(verdicts: Group) -> Table:
    """Creates the table of all runs: the loss relative to the twin, by scenario and seed."""
    protections = list(_groups(verdicts, lambda v: v.outcome.protection))
    rows = []
    pairs = _groups(verdicts, lambda v: (v.family, v.outcome.scenario, v.outcome.seed))
    for (family, scenario, seed), group in pairs.items():
        cells = {v.outcome.protection: cell(v) for v in group}
        rows.append([family, scenario, str(seed), *(cells.get(p, "") for p in protections)])
    return Table(
        "Held-out loss over the clean twin's; saved runs in bold, steps to the alarm after @",
        ["family", "scenario", "seed", *protections],
        rows,
    )


def cell(verdict: Verdict) -> str:
    """Formats one run in a few characters."""
    ended, ratio = verdict.outcome.ended, verdict.ratio
    text = ended if ratio is None or ended in ("failed", "hung") else f"{ratio:.3f}"
    text += f" {ended}" if ended == "stopped" and ratio is not None else ""
    text = f"**{text}**" if verdict.saved else text
    text += "" if verdict.delay is None else f" @{verdict.delay}"
    return text + (" named" if verdict.named else "")


def not_run(missing: Mapping[str, str]) -> Table:
    """Creates the table of protections that could not be run, with their errors."""
    rows = [[name, error.replace("|", "/")] for name, error in missing.items()]
    return Table("Not run", ["protection", "error"], rows)


def _count_ended(group: Group, endings: tuple[str, ...]) -> int:
    return sum(v.outcome.ended in endings for v in group)


def _groups(verdicts: Group, key: Callable[[Verdict], object]) -> dict:
    """Groups verdicts by key, in the order in which the keys first occur."""
    groups: dict = {}
    for verdict in verdicts:
        groups.setdefault(key(verdict), []).append(verdict)
    return groups
