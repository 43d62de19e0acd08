"""Tables of the comparisons. Imports what `benchmarks.healthy.judge` imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.healthy.judge import VERDICTS, Comparison
from benchmarks.results import Table


def line(comparison: Comparison) -> str:
    """Returns one line for the console."""
    return f"{comparison.verdict:<26} {comparison.name}: {_what_happened(comparison)}"


def summary(comparisons: Sequence[Comparison]) -> Table:
    """Counts the verdicts by group."""
    groups = list(dict.fromkeys(c.group for c in comparisons))
    rows = [_row(group, [c for c in comparisons if c.group == group]) for group in groups]
    return Table("healthy kinds", ["group", "kinds", *VERDICTS], [*rows, _row("all", comparisons)])


def _row(name: str, comparisons: Sequence[Comparison]) -> list[str]:
    counts = [sum(c.verdict == verdict for c in comparisons) for verdict in VERDICTS]
    return [name, str(len(comparisons)), *map(str, counts)]


def everything(comparisons: Sequence[Comparison]) -> Table:
    """Lists the kinds with their practices, by group."""
    columns = ["kind", "practice", "verdict", "incidents and responses", "rolled back"]
    columns += ["value at start, end, end with suite", "wall time, ratio"]
    rows = [
        [
            *(c.name, c.practice, c.verdict, _what_happened(c), str(c.rollbacks)),
            ", ".join(f"{value:.3g}" for value in c.values),
            f"{c.seconds[1] / c.seconds[0]:.2f}",
        ]
        for c in comparisons
    ]
    return Table("each kind, bare and with the suite", columns, rows)


def _what_happened(c: Comparison) -> str:
    """Describes the incidents, the responses and the differences; "-" for a silent run."""
    texts = [
        _counts(c.incidents) and f"incidents: {_counts(c.incidents)}",
        _counts(c.responses) and f"responses: {_counts(_short(c.responses))}",
        "; ".join(f"warning: {_cell(warning)}" for warning in c.warnings),
        f"different: {', '.join(c.different)}" if c.different else "",
        f"step {c.steps[1]} of {c.steps[0]}" if c.steps[0] != c.steps[1] else "",
        _cell(c.message.split("(")[0]),
    ]
    return "; ".join(filter(None, texts)) or "-"


def _cell(text: str) -> str:
    """Shortens a message for a cell of a table."""
    return " ".join(text.split()).replace("|", "/")[:120]


def _short(responses: Mapping[str, int]) -> Mapping[str, int]:
    """Counts the responses by what was done, without how: the factors are in the JSON file.

    >>> _short({"rolled back, learning rate x0.5": 1, "rolled back and replayed": 2})
    {'rolled back': 3, 'learning rate lowered': 1}
    """
    counts: dict[str, int] = {}
    for response, count in responses.items():
        name = "rolled back" if response.startswith("rolled back") else response.split(":")[0]
        name = "learning rate held" if name.startswith("learning rate held") else name
        counts[name] = counts.get(name, 0) + count
        if ", learning rate x" in response:
            counts["learning rate lowered"] = counts.get("learning rate lowered", 0) + count
    return counts


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(name if n == 1 else f"{name} ({n}x)" for name, n in counts.items())
