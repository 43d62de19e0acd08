"""Prints a range report: a verdict on each format, then the layers, worst first.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_stability.checks.finding import Finding
from lit_stability.checks.precision_ranges.limits import not_finite
from lit_stability.checks.precision_ranges.report import RangeReport, RangeRow
from lit_stability.checks.precision_ranges.verdict import Verdict, judge
from lit_stability.checks.text_table import align, format_share, wrap
from lit_stability.measurement.float_formats import BFLOAT16, FLOAT16, FloatFormat

SHOWN = (FLOAT16, BFLOAT16)
"""The formats that the table has columns for, the one with the narrower range first."""
_HEAD = (
    *("layer", "of", "smallest", "median", "largest", "zero"),
    *("fp16 overflow", "fp16 subnormal", "fp16 to zero", "bf16 overflow", "bf16 to zero"),
)


def format_report(report: RangeReport, limit: int | None = 15) -> str:
    """Returns a report as text: a verdict on fp16 and bf16, then a table of the layers.

    Shares are of all elements, except that shares of elements that become zero are of the elements
    above zero. Columns without values are omitted. Gradients are shown without a loss scale.

    Args:
        report: The measurement.
        limit: Largest number of rows of the table; None for all.

    Raises:
        ValueError: If `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for every row")
    verdicts = [judge(report, number_format) for number_format in SHOWN]
    rows = worst_first(report.rows)
    lines = [line for verdict in verdicts for line in [*_verdict(verdict), ""]]
    if finding := _non_finite(report, rows):
        lines += [finding.text(), ""]
    table = _without_empty_columns([_HEAD, *(_cells(row) for row in rows[:limit])])
    lines += align(table, left=2)
    hidden = len(rows) - len(rows[:limit])
    end = f"{hidden} more rows; " if hidden else ""
    plural = "es" if report.batches != 1 else ""
    lines.append(f"{end}measured in float32 over {report.batches} batch{plural}")
    return "\n".join(lines)


def worst_first(rows: Sequence[RangeRow]) -> list[RangeRow]:
    """Returns rows sorted by what the formats lose: non-finite, overflow, then rounded to zero."""
    return sorted(rows, key=_loss_of_formats, reverse=True)


def _loss_of_formats(row: RangeRow) -> tuple[float, ...]:
    overflows = (row.overflowing(number_format) / row.elements for number_format in reversed(SHOWN))
    to_zero = row.vanishing(FLOAT16) / max(1, row.nonzero)
    return (row.non_finite / row.elements, *overflows, to_zero, row.largest)


def _verdict(verdict: Verdict, most: int = 5) -> list[str]:
    """Returns the verdict, the layers that overflow, and the advice, wrapped."""
    lines = [f"{verdict.format}: {verdict.status}"]
    lines += [
        f"    {overflow.kind} of {overflow.layer}: {format_share(overflow.share)}, "
        f"up to {overflow.largest:.3g}"
        for overflow in verdict.overflows[:most]
    ]
    if len(verdict.overflows) > most:
        lines.append(f"    and {len(verdict.overflows) - most} more")
    for sentence in verdict.advice:
        lines += wrap(sentence, first="  - ", following="    ")
    return lines


def _non_finite(report: RangeReport, rows: Sequence[RangeRow]) -> Finding | None:
    """Returns a finding on values that are Inf or NaN in float32 already, or None."""
    names = tuple(dict.fromkeys(row.layer for row in rows if row.non_finite))
    if not names:
        return None
    damaged = bool(not_finite(report))
    return Finding(
        severity="error" if damaged else "note",
        what="values are Inf or NaN in float32",
        where=names,
        why="no format can represent them; they are excluded from the shares below",
        remedy="fix the model or the data first" if damaged else "nothing, if a mask contains -inf",
        check="finite",
    )


def _cells(row: RangeRow) -> tuple[str, ...]:
    magnitudes = (f"{value:.1e}" for value in (row.smallest, row.median, row.largest))
    return (
        row.layer,
        row.kind,
        *magnitudes,
        format_share(row.zeros / row.elements),
        format_share(row.overflowing(FLOAT16) / row.elements),
        format_share(row.subnormal(FLOAT16) / row.elements),
        _share_to_zero(row, FLOAT16),
        format_share(row.overflowing(BFLOAT16) / row.elements),
        _share_to_zero(row, BFLOAT16),
    )


def _share_to_zero(row: RangeRow, number_format: FloatFormat) -> str:
    return format_share(row.vanishing(number_format) / max(1, row.nonzero))


def _without_empty_columns(table: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    columns = [column for column in zip(*table, strict=True) if set(column[1:]) != {"."}]
    return list(zip(*columns, strict=True))
