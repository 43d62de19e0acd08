"""Prints the report on a metric log: what was read, the findings, and the metrics.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
import time

from lit_stability.checks.finding import SHOWN_NAMES, count_by_severity
from lit_stability.checks.metric_log.report import LogReport
from lit_stability.checks.text_table import align, format_number, join_names, more_rows


def format_log_report(
    report: LogReport, limit: int | None = 15, *, table: bool = True, now: float | None = None
) -> str:
    """Returns a report as text.

    Args:
        report: Of one run.
        limit: Largest number of metrics in the table; None for all, and for all names.
        table: Whether to append the table of metrics.
        now: Seconds since 1970, by default the present time.

    Raises:
        ValueError: If `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for every row")
    names = None if limit is None else SHOWN_NAMES
    used = [f"{role} {join_names(found, names)}" for role, found in report.used.items()]
    lines = [
        f"a log of {report.format}: {report.points:,} points of the loss, steps "
        f"{report.first_step} to {report.last_step}{_of(report)}",
        f"used: {'; '.join(used)}",
        f"last written {_when(report.last_written, now)}{_ended(report)}",
        *(f"not read: {problem}" for problem in report.problems),
        "",
    ]
    for finding in report.findings:
        lines += [finding.text(names=names), ""]
    counts = count_by_severity(report.findings)
    lines.append(f"found: {counts}" if counts else "nothing found")
    return "\n".join([*lines, *(["", *_table(report, limit)] if table else [])])


def _of(report: LogReport) -> str:
    return f" of {report.planned_steps}" if report.planned_steps else ""


def _ended(report: LogReport) -> str:
    if report.complete is None:
        return "; this format does not record whether the run ended"
    return "; the run ended" if report.complete else "; the end of the run is not in it"


def _when(written: float, now: float | None) -> str:
    """Returns a time and how long ago it was.

    >>> _when(1_700_000_000, now=1_700_007_200)[-9:]
    '2.0 h ago'
    """
    if not math.isfinite(written):
        return "at an unknown time"
    age = max(0.0, (time.time() if now is None else now) - written)
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= seconds:
            return f"{_clock(written)}, {age / seconds:.1f} {unit} ago"
    return f"{_clock(written)}, {age:.0f} s ago"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _table(report: LogReport, limit: int | None) -> list[str]:
    used = [name for names in report.used.values() for name in names]
    rows = sorted(report.series, key=lambda s: (s.name not in used, s.name))
    shown = rows[:limit]
    cells = [
        (
            *(s.name, str(s.points), str(s.first_step), str(s.last_step)),
            *(format_number(s.minimum), format_number(s.last), str(s.non_finite or ".")),
        )
        for s in shown
    ]
    header = ("metric", "points", "first step", "last step", "lowest", "last", "NaN or Inf")
    return [*align([header, *cells], left=1), *more_rows(len(rows) - len(shown), "metrics")]
