"""Reads Lightning's ``metrics.csv``, and other tables with a column of steps.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from lit_stability.checks.metric_log.series import MetricLog, number_of

NAME = "CSV"
FILE = "metrics.csv"
"""Name of the file of Lightning's ``CSVLogger``."""
_STEPS = ("step", "global_step", "trainer/global_step", "_step", "iteration", "iter", "epoch")
"""Names of a column of steps, in lower case, the best first."""
_TIMES = ("_timestamp", "wall time", "wall_time", "timestamp", "time")


def accepts(file: Path) -> bool:
    """Returns whether the file is a table."""
    return file.suffix == ".csv"


def read(files: Sequence[Path]) -> MetricLog:
    """Reads a table in which a row has the metrics of one step, or some of them.

    Args:
        files: One table with a header.
    """
    (file,) = files
    log = MetricLog(NAME, file, (file,))
    with file.open(newline="", encoding="utf8", errors="replace") as stream:
        rows = csv.reader(_without_nul(stream))
        try:
            header = next(rows, [])
            _read_rows(rows, header, log)
        except csv.Error as error:
            log.problems.append(f"line {rows.line_num} and what follows cannot be read ({error})")
    return log


def _read_rows(rows: Iterator[list[str]], header: Sequence[str], log: MetricLog) -> None:
    columns = {name.strip().lower(): i for i, name in reversed([*enumerate(header)])}
    step_at = next((columns[name] for name in _STEPS if name in columns), None)
    time_at = next((columns[name] for name in _TIMES if name in columns), None)
    if step_at is None and header:
        log.problems.append("no column of steps: the number of the row is used")
    others = [
        (i, name.strip()) for i, name in enumerate(header) if i not in (step_at, time_at) and name
    ]
    damaged = 0
    for row_number, row in enumerate(rows):
        step: float | None = row_number
        if step_at is not None:
            step = number_of(row[step_at]) if step_at < len(row) else None
        if step is None or not math.isfinite(step):
            damaged += bool(row)
            continue
        given = number_of(row[time_at]) if time_at is not None and time_at < len(row) else None
        time = math.nan if given is None else given
        for i, name in others:
            if i < len(row) and row[i]:
                value = number_of(row[i])
                if value is not None:
                    log.add(name, int(step), value, time)
    if damaged:
        log.problems.append(f"{damaged} rows have no step and are ignored")


def _without_nul(stream: TextIO) -> Iterator[str]:
    """Returns the lines; a file system that failed may have left zeros in them."""
    for line in stream:
        yield line.replace("\0", "")
