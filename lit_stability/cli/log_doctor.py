"""The part of `lit-stability doctor` that examines metric logs.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_stability.checks.metric_log import (
    LogReader,
    LogReport,
    NoLossError,
    examine_log,
    find_logs,
    format_log_report,
)
from lit_stability.cli.run_folders import newest_run
from lit_stability.errors import ConfigError
from lit_stability.printing import printable
from lit_stability.training_state.good_checkpoints import find_last_good

READ = "event files of TensorBoard, metrics.csv, trainer_state.json and *.wandb"
"""The logs that are found in a folder."""


def logs_at(path: Path, *, wanted: bool) -> list[tuple[LogReader, list[Path]]]:
    """Returns reader and files of each metric log, if these are what to examine.

    Args:
        path: As given on the command line.
        wanted: Whether an option is given that only logs have. Without it, the last known good
            checkpoint in a folder comes first.
    """
    if path.is_dir() and not wanted and find_last_good(newest_run(path)) is not None:
        return []
    return [*find_logs(path)]


def examine_logs(
    logs: Sequence[tuple[LogReader, list[Path]]], args: argparse.Namespace
) -> tuple[dict[str, Any], bool]:
    """Examines logs, and prints the reports unless `--json` is given.

    Args:
        logs: Reader and files of each run.
        args: Of the command.

    Returns:
        The reports as JSON types, and whether none of them has an error.

    Raises:
        ConfigError: If no log could be examined, or an option is for checkpoints only.
    """
    if args.other is not None:
        raise ConfigError(f"{args.other}: metric logs are not compared; give one path")
    if args.plot is not None:
        raise ConfigError(f"--plot {args.plot}: draws checkpoints only, and these are metric logs")
    reports: list[LogReport] = []
    unread: dict[str, str] = {}
    for reader, files in logs:
        report = _examine(reader, files, args.loss)
        if isinstance(report, str):
            unread[str(files[0])] = report
            continue
        reports.append(report)
        if not args.json:
            text = format_log_report(report, None if args.all else 15, table=len(logs) == 1)
            print(printable(f"{report.path}\n{text}\n", keep="\n"))
    if not reports:
        raise ConfigError(*(f"{path}: {why}" for path, why in unread.items()))
    if not args.json:
        for path, why in unread.items():
            print(printable(f"{path}: not examined: {why}"))
        if len(logs) > 1:
            print(_summary(reports))
    content = {"logs": [report.as_dict() for report in reports], "not_examined": unread}
    return content, all(report.healthy for report in reports)


def _examine(reader: LogReader, files: Sequence[Path], loss: str | None) -> LogReport | str:
    """Returns the report on a log; or why there is none."""
    try:
        log = reader.read(files)
    except OSError as error:
        return f"cannot be read ({error})"
    try:
        return examine_log(log, loss)
    except NoLossError as error:
        return "; ".join([f"{reader.NAME}: {error}", *log.problems])


def _summary(reports: Sequence[LogReport]) -> str:
    bad = [report.path for report in reports if not report.healthy]
    if not bad:
        return f"{len(reports)} logs, none with an error"
    return printable(f"{len(reports)} logs, {len(bad)} with errors: {', '.join(bad)}")
