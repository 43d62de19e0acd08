"""The table of experiments, as text for a terminal, as markdown, or as JSON types.

Pure logic on plain data; imports neither torch nor Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_stability.cli.experiments.running import Result

_HEAD = ("experiment", "", "expected", "observed", "incidents", "time")
_SHARES = (3, 4, 3)
"""Shares of the remaining terminal width: expected, observed, incidents."""
_MARK, _NAME = 2, 32
"""Width of the marks, and maximum width of the names."""
_TIME = 7


def as_text(results: Sequence[Result], width: int = 110) -> str:
    """Returns the table for a terminal, with wrapped cells.

    Args:
        results: one row each.
        width: width of the terminal in characters; at least 80 are used.
    """
    name = min(_NAME, max([len(_HEAD[0]), *(len(each.name) for each in results)]))
    room = max(80, width) - 2 * (len(_HEAD) - 1) - name - _MARK - _TIME
    widths = [name, _MARK, *(room * share // sum(_SHARES) for share in _SHARES), _TIME]
    lines = [_line(_HEAD, widths), _line(["-" * each for each in widths], widths)]
    for result in results:
        lines += _rows(result, widths)
    return "\n".join([*lines, "", headline(results)])


def headline(results: Sequence[Result]) -> str:
    """Returns how many results are as expected, and which are not."""
    others = [each.name for each in results if not each.met]
    count = f"{len(results) - len(others)} of {len(results)} as expected"
    return f"{count}; not: {', '.join(others)}" if others else count


def as_markdown(results: Sequence[Result]) -> str:
    """Returns the table as markdown, with the description of each experiment."""
    lines = ["| experiment | about | expected | observed | incidents | time |"]
    lines.append("|---|---|---|---|---|---|")
    for each in results:
        expected = "<br>".join(f"{_mark(v.met)}: {v.expected}" for v in each.verdicts)
        observed = "<br>".join(v.observed for v in each.verdicts)
        cells = [each.name, each.about, expected, observed]
        cells += ["<br>".join(_incidents(each)), f"{each.seconds:.0f} s"]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, "", headline(results), ""])


def as_dict(results: Sequence[Result]) -> dict[str, Any]:
    """Returns the results as JSON types."""
    return {"version": 1, "experiments": [each.as_dict() for each in results]}


def _rows(result: Result, widths: Sequence[int]) -> Iterator[str]:
    """Yields the lines of one experiment: a block per verdict, with the other cells next to it."""
    name = textwrap.wrap(result.name, widths[0])
    verdicts: list[tuple[str, str, str]] = []
    for each in result.verdicts:
        expected = textwrap.wrap(each.expected, widths[2])
        observed = textwrap.wrap(each.observed, widths[3])
        verdicts += zip_longest([_mark(each.met)], expected, observed, fillvalue="")
    found = [line for text in _incidents(result) for line in textwrap.wrap(text, widths[4])]
    times = [f"{result.seconds:.0f} s"]
    for one, verdict, incident, took in zip_longest(name, verdicts, found, times):
        yield _line([one or "", *(verdict or ("", "", "")), incident or "", took or ""], widths)


def _incidents(result: Result) -> list[str]:
    """Returns each kind of incident with its leading cause and its count, or "none"."""
    counts: dict[str, int] = {}
    for incident in result.incidents:
        text = _describe(incident)
        counts[text] = counts.get(text, 0) + 1
    return [text if n == 1 else f"{text} ({n}x)" for text, n in counts.items()] or ["none"]


def _describe(incident: Mapping[str, Any]) -> str:
    cause = f": {incident['cause']}" if incident["cause"] else ""
    return f"{incident['kind']}{cause}, {incident['outcome']}"


def _mark(met: bool) -> str:
    return "ok" if met else "NO"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
