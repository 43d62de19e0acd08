"""The report in words and as a table, the worst layers first.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lit_stability.checks.precision_ranges.report import RangeReport, RangeRow
from lit_stability.checks.precision_ranges.verdict import Verdict, judge
from lit_stability.measurement.float_formats import BFLOAT16, FLOAT16, FloatFormat

SHOWN = (FLOAT16, BFLOAT16)
"""The formats that the table has columns for, the narrower range first."""
_HEAD = (
    *("layer", "of", "smallest", "median", "largest", "zero"),
    *("fp16 overflow", "fp16 subnormal", "fp16 to zero", "bf16 overflow", "bf16 to zero"),
)
_WIDTH = 100


def format_report(report: RangeReport, limit: int | None = 15) -> str:
    """Put a report in words: a verdict on fp16 and bf16, then the layers.

    Shares are of all elements, those that become zero of the elements above zero; a column with
    nothing in it is left out. Gradients are shown as they are, without a loss scale.

    Args:
        report: what was measured.
        limit: most rows of the table; None for all.

    Raises:
        ValueError: if `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for every row")
    verdicts = [judge(report, each) for each in SHOWN]
    rows = worst_first(report.rows)
    lines = [line for verdict in verdicts for line in [*_in_words(verdict), ""]]
    lines += _on_non_finite(rows)
    lines += _aligned(_telling([_HEAD, *(_cells(row) for row in rows[:limit])]))
    hidden = len(rows) - len(rows[:limit])
    end = f"{hidden} more rows; " if hidden else ""
    plural = "es" if report.batches != 1 else ""
    lines.append(f"{end}measured in float32 over {report.batches} batch{plural}")
    return "\n".join(lines)


def worst_first(rows: Sequence[RangeRow]) -> list[RangeRow]:
    """Rows by what the formats would lose: non-finite, overflow, then what becomes zero."""
    return sorted(rows, key=_severity, reverse=True)


def _severity(row: RangeRow) -> tuple[float, ...]:
    overflows = (row.overflowing(each) / row.elements for each in reversed(SHOWN))
    lost = row.vanishing(FLOAT16) / max(1, row.nonzero)
    return (row.non_finite / row.elements, *overflows, lost, row.largest)


def _in_words(verdict: Verdict, most: int = 5) -> list[str]:
    """The verdict, the layers that overflow, and the advice, wrapped."""
    lines = [f"{verdict.format}: {verdict.status}"]
    lines += [
        f"    {one.kind} of {one.layer}: {in_percent(one.share)}, up to {one.largest:.3g}"
        for one in verdict.overflows[:most]
    ]
    if len(verdict.overflows) > most:
        lines.append(f"    and {len(verdict.overflows) - most} more")
    for sentence in verdict.advice:
        lines += textwrap.wrap(
            sentence,
            _WIDTH,
            initial_indent="  - ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _on_non_finite(rows: Sequence[RangeRow]) -> list[str]:
    names = list(dict.fromkeys(row.layer for row in rows if row.non_finite))
    if not names:
        return []
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [f"not finite in float32 already, left out of the shares: {shown}", ""]


def _cells(row: RangeRow) -> tuple[str, ...]:
    magnitudes = (f"{value:.1e}" for value in (row.smallest, row.median, row.largest))
    return (
        row.layer,
        row.kind,
        *magnitudes,
        in_percent(row.zeros / row.elements),
        in_percent(row.overflowing(FLOAT16) / row.elements),
        in_percent(row.subnormal(FLOAT16) / row.elements),
        _lost(row, FLOAT16),
        in_percent(row.overflowing(BFLOAT16) / row.elements),
        _lost(row, BFLOAT16),
    )


def _lost(row: RangeRow, each: FloatFormat) -> str:
    return in_percent(row.vanishing(each) / max(1, row.nonzero))


def in_percent(value: float) -> str:
    """Put a share in percent; a dot for none, so that what there is stands out.

    >>> in_percent(0.0), in_percent(1.0), in_percent(0.1234), in_percent(1e-6)
    ('.', '100%', '12%', '<0.1%')
    """
    if value == 0:
        return "."
    if value < 1e-3:
        return "<0.1%"
    return f"{value:.1%}" if value < 0.095 else f"{value:.0%}"


def _telling(table: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The table without the columns in which there is nothing."""
    columns = [column for column in zip(*table, strict=True) if set(column[1:]) != {"."}]
    return list(zip(*columns, strict=True))


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, two words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines
