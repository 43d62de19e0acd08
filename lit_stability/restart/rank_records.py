"""The crash records of several ranks, in a folder that outlives their processes.

``recovery-RUN/attempt=K/rank=R.json`` has the crash of a rank and the state of the recovery after
it; ``attempt=K/started.json`` has the folder of the fit. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lit_stability.restart.crashes import Crash
from lit_stability.training_state.atomic_write import write_atomically

_SECONDARY = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|\bNCCL\b|\bgloo\b|"
    r"process group|timed out|socket",
    re.IGNORECASE,
)
"""What a rank reports that lost the connection to one that crashed."""


@dataclass
class RecoveryState:
    """What the processes of the next attempt need to know about those before it."""

    plan: dict[str, Any] = field(default_factory=dict)
    """Fields of the `Plan`."""
    batch_size: int | None = None
    """The halved batch size, if it was halved."""
    in_a_row: int = 0
    furthest: int = 0
    crashes: list[dict[str, Any]] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    gave_up: str | None = None
    """Why there is no remedy, if there is none."""

    def to_json(self) -> str:
        """Returns the state as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RecoveryState:
        """Returns a state from its JSON; keys of later versions are ignored."""
        raw = json.loads(text)
        return cls(**{each.name: raw[each.name] for each in fields(cls) if each.name in raw})


class RankRecords:
    """Reads and writes the records of one run.

    Args:
        folder: on a file system that all ranks share; created when something is written.
        attempt: number of this attempt, from 0.
    """

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt

    def begin(self) -> None:
        """Deletes the records of another run with this name; called by rank 0 alone."""
        if self._attempt == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def started(self, folder: Path, before: tuple[Path, int] | None) -> None:
        """Records the folder of the fit, and the good checkpoint that was there before.

        Raises:
            OSError: if it cannot be written.
        """
        known = None if before is None else [str(before[0]), before[1]]
        self._write("started.json", {"folder": str(folder), "before": known})

    def crashed(self, rank: int, state: RecoveryState) -> Path:
        """Records the crash of a rank and what to do about it; returns the file.

        Raises:
            OSError: if it cannot be written.
        """
        content = {"schema": 1, "rank": rank, "time": time.time(), "state": asdict(state)}
        return self._write(f"rank={rank}.json", content)

    def folders(self) -> dict[Path, tuple[Path, int] | None]:
        """Returns the folders of the fits so far, the oldest first; see `started`."""
        found: dict[Path, tuple[Path, int] | None] = {}
        for attempt in range(self._attempt):
            for row in self._read(attempt, "started.json"):
                known = row["before"]
                found.setdefault(
                    Path(row["folder"]), None if known is None else (Path(known[0]), known[1])
                )
        return found

    def state(self) -> tuple[RecoveryState, str]:
        """Returns the state after the attempts so far, and what ended the last one, in words."""
        for attempt in reversed(range(self._attempt)):
            rows = self._read(attempt, "rank=*.json")
            if not rows:
                continue
            first = min(rows, key=lambda row: (is_secondary(_last(row)), row["time"]))
            state = RecoveryState(**first["state"])
            if attempt < self._attempt - 1:
                return state, _KILLED
            return state, f"rank {first['rank']}: {state.lines[-1]}"
        return RecoveryState(), "" if self._attempt == 0 else _KILLED

    def _read(self, attempt: int, pattern: str) -> list[dict[str, Any]]:
        files = sorted((self._folder / f"attempt={attempt}").glob(pattern))
        return [json.loads(file.read_text(encoding="utf8")) for file in files]

    def _write(self, name: str, content: dict[str, Any]) -> Path:
        file = self._folder / f"attempt={self._attempt}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = (json.dumps(content, indent=2) + "\n").encode()
        # An exception may quote anything.
        write_atomically(file, text, partial=f".{name}.partial", private=True)
        return file


_KILLED = "a process ended without an exception, for example because it was killed"


def is_secondary(crash: dict[str, Any]) -> bool:
    """Returns whether a rank crashed because another one had.

    >>> is_secondary({"kind": "other", "message": "Connection closed by peer [127.0.0.1]:29500"})
    True
    >>> is_secondary({"kind": "out of memory", "message": "raised on rank 1: OutOfMemoryError: x"})
    True
    >>> is_secondary({"kind": "instability", "message": "the loss diverged"})
    False
    """
    if crash["message"].startswith("raised on rank "):
        return True
    return crash["kind"] == "other" and bool(_SECONDARY.search(crash["message"]))


def _last(row: dict[str, Any]) -> dict[str, Any]:
    crash: dict[str, Any] = row["state"]["crashes"][-1]
    return crash


def hashable(sample: Any) -> Any:
    """Returns a sample index from JSON, which has lists for tuples.

    >>> hashable([3, ["a", 4]])
    (3, ('a', 4))
    """
    return tuple(map(hashable, sample)) if isinstance(sample, list) else sample


def crash_of(row: dict[str, Any]) -> Crash:
    """Returns a crash from its record."""
    samples = row["samples"]
    return Crash(**{**row, "samples": None if samples is None else tuple(map(hashable, samples))})
