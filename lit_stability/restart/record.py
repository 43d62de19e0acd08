"""The crash record: one JSON line per crash in ``recoveries.jsonl``, next to the incidents.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from lit_stability.incidents.log import append_lines
from lit_stability.lightning_choice import suite_logger
from lit_stability.outside import guarded
from lit_stability.restart.crashes import Crash

log = suite_logger()

SCHEMA = 1
"""Version of the line format."""


class RecoveryRecord:
    """Reports each crash once, on the console and in a file.

    Args:
        folder: folder of the first fit; None if it has none, then nothing is written.
        run: id of its run; empty if it is not known.
    """

    def __init__(self, folder: Path | None, run: str = "") -> None:
        self._run = run
        self.path = None if folder is None else folder / "recoveries.jsonl"

    def add(self, crash: Crash, remedy: str, checkpoint: Path | str | None) -> str:
        """Reports a crash, its remedy, and the checkpoint that the next fit resumes from.

        Returns:
            The line printed on the console.
        """
        line = f"{crash.in_words()} -> {remedy}; " + (
            f"resuming from {checkpoint}" if checkpoint else "no good checkpoint: from the start"
        )
        self.write(crash, remedy, checkpoint, "restart")
        log.warning("%s", line)
        return line

    def give_up(self, crash: Crash, reason: str) -> str:
        """Reports a crash that is not recovered from.

        Returns:
            The line printed on the console.
        """
        line = f"{crash.in_words()} -> gave up: {reason}"
        self.write(crash, reason, None, "give up")
        log.warning("%s", line)
        return line

    def write(self, crash: Crash, remedy: str, checkpoint: object, event: str) -> None:
        """Adds a line to the file, and prints nothing."""
        if self.path is None:
            return
        row = asdict(crash) | {
            "samples": None if crash.samples is None else [_plain(s) for s in crash.samples],
            "remedy": remedy,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "time": time.time(),
        }
        path, line = self.path, {"schema": SCHEMA, "event": event, "run": self._run, **row}
        guarded(self, f"cannot write {path}", lambda: append_lines(path, [line]))


def _plain(sample: object) -> object:
    return sample if isinstance(sample, (int, str)) else str(sample)
