"""Verdicts in tables: of each protection, of each family of faults, and of everything.

Data in, text out: may import `benchmarks.results` for the tables themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from benchmarks.rescue.judge import BARE, Verdict
from benchmarks.rescue.scenario import HEALTHY
from benchmarks.results import Table

Group = Sequence[Verdict]


def share(group: Group, test: Callable[[Verdict], bool]) -> str:
    """How many of how many; a dash for none.

    >>> share([], lambda verdict: True)
    '-'
    """
    return f"{sum(map(test, group))}/{len(group)}" if group else "-"


def middle(values: Iterable[float | None], places: int = 0) -> str:
    """Median of what is known; a dash for nothing.

    >>> middle([3, None, 1, 2])
    '2'
    """
    known = [value for value in values if value is not None]
    return f"{median(known):.{places}f}" if known else "-"


def by_protection(verdicts: Group, tells: frozenset[str]) -> Table:
    """One line for each protection.

    Args:
        verdicts: of all runs.
        tells: protections that say when something is wrong.
    """
    columns = ["protection", "saved", "saved where bare is lost", "lost where bare is saved"]
    columns += ["noticed", "after steps", "cause named", "named beyond remedy", "steps lost"]
    columns += ["stopped", "NaN", "failed"]
    faulty = [v for v in verdicts if v.family != HEALTHY]
    bare = {_key(v) for v in faulty if v.outcome.protection == BARE and v.saved}
    groups = _groups(faulty, lambda v: v.outcome.protection).items()
    return Table("What is saved", columns, [_line(n, g, bare, n in tells) for n, g in groups])


def _line(name: str, group: Group, bare: set[tuple[str, int]], tells: bool) -> list[str]:
    hopeful = [v for v in group if not v.beyond_remedy]
    hopeless = [v for v in group if v.beyond_remedy and v.named is not None]
    return [
        name,
        share(hopeful, lambda v: v.saved),
        share([v for v in hopeful if _key(v) not in bare], lambda v: v.saved),
        share([v for v in hopeful if _key(v) in bare], lambda v: not v.saved),
        share(group, lambda v: v.detected) if tells else "-",
        middle(v.delay for v in group) if tells else "-",
        share([v for v in group if v.named is not None], lambda v: bool(v.named)),
        share(hopeless, lambda v: bool(v.named)),
        middle(v.lost for v in hopeful if v.saved),
        *(str(_ended(group, how)) for how in (("stopped",), ("NaN",), ("failed", "hung"))),
    ]


def _key(verdict: Verdict) -> tuple[str, int]:
    return verdict.outcome.scenario, verdict.outcome.seed


def on_healthy(verdicts: Group, tells: frozenset[str]) -> Table:
    """What each protection does to runs with which nothing is wrong."""
    columns = ["protection", "runs with an alarm", "alarms", "left as they were, to the bit"]
    columns += ["more than 5 % worse", "not finished", "CPU time"]
    rows = []
    healthy = [v for v in verdicts if v.family == HEALTHY]
    for name, group in _groups(healthy, lambda v: v.outcome.protection).items():
        alarms = sum(v.false_alarms for v in group)
        rows.append(
            [
                name,
                share(group, lambda v: v.false_alarms > 0) if name in tells else "-",
                str(alarms) if name in tells else "-",
                share(group, lambda v: v.untouched),
                share(group, lambda v: v.outcome.ended == "finished" and not v.saved),
                share(group, lambda v: v.outcome.ended != "finished"),
                middle((v.slower for v in group), 2),
            ]
        )
    return Table("What is done to healthy runs", columns, rows)


def by_family(verdicts: Group) -> Table:
    """Runs saved, family by protection."""
    faulty = [v for v in verdicts if v.family != HEALTHY]
    protections = list(_groups(faulty, lambda v: v.outcome.protection))
    rows = []
    for family, group in _groups(faulty, lambda v: v.family).items():
        cells = _groups(group, lambda v: v.outcome.protection)
        rows.append([family, *(share(cells.get(p, []), lambda v: v.saved) for p in protections)])
    return Table("Saved, by family of faults", ["family", *protections], rows)


def everything(verdicts: Group) -> Table:
    """One line for each scenario and seed: how far from the twin each protection ended."""
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
    """One run in a few characters."""
    ended, ratio = verdict.outcome.ended, verdict.ratio
    text = ended if ratio is None or ended in ("failed", "hung") else f"{ratio:.3f}"
    text += f" {ended}" if ended == "stopped" and ratio is not None else ""
    text = f"**{text}**" if verdict.saved else text
    text += "" if verdict.delay is None else f" @{verdict.delay}"
    return text + (" named" if verdict.named else "")


def not_run(missing: Mapping[str, str]) -> Table:
    """Protections that could not be run, with what they said."""
    rows = [[name, error.replace("|", "/")] for name, error in missing.items()]
    return Table("Not run", ["protection", "error"], rows)


def _ended(group: Group, how: tuple[str, ...]) -> int:
    return sum(v.outcome.ended in how for v in group)


def _groups(verdicts: Group, key: Callable[[Verdict], object]) -> dict:
    """In the order in which keys first come."""
    found: dict = {}
    for verdict in verdicts:
        found.setdefault(key(verdict), []).append(verdict)
    return found
