"""One reader for each format of a metric log, and how the logs in a folder are found.

A reader is a module with `NAME`, `accepts` and `read`. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from lit_stability.checks.metric_log.readers import csv_file, hugging_face, tensorboard, wandb
from lit_stability.checks.metric_log.series import MetricLog


class LogReader(Protocol):
    """Reads one format."""

    NAME: str
    """Name of the format."""

    def accepts(self, file: Path) -> bool:
        """Returns whether a file has the format, by its name."""

    def read(self, files: Sequence[Path]) -> MetricLog:
        """Reads the files of one run; what cannot be read is in `MetricLog.problems`."""


READERS: tuple[LogReader, ...] = (tensorboard, csv_file, hugging_face, wandb)


def reader_of(file: Path) -> LogReader | None:
    """Returns the reader that accepts a file, None if no reader does.

    >>> reader_of(Path("lightning_logs/version_0/metrics.csv")).NAME
    'CSV'
    """
    return next((reader for reader in READERS if reader.accepts(file)), None)


def find_logs(path: Path) -> Iterator[tuple[LogReader, list[Path]]]:
    """Returns the reader and the files of each run at a path, in the order of their names.

    Event files in one folder are one run. Of the states that checkpoints of Hugging Face's Trainer
    have, the newest is read, as it has the rows of all others. Hidden folders are left out.

    Args:
        path: A file, the folder of a run, or a folder of runs.
    """
    if path.is_file():
        reader = reader_of(path)
        if reader is not None:
            yield reader, [path]
        return
    states: dict[Path, list[Path]] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(folder, name) for name in sorted(names)]
        events = [file for file in files if tensorboard.accepts(file)]
        if events:
            yield tensorboard, events
        for file in files:
            if file.suffix == ".csv" and file.name != csv_file.FILE:
                continue  # in a folder, any other table may be data
            reader = reader_of(file)
            if reader is hugging_face:
                states.setdefault(hugging_face.run_of(file), []).append(file)
            elif reader is not None and reader is not tensorboard:
                yield reader, [file]
    for run in sorted(states):
        yield hugging_face, [hugging_face.newest(states[run])]
