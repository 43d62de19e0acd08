"""The incident record ``incidents.jsonl``: one line per opening and per closing, and its reader.

Imports neither torch nor Lightning.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lit_stability.incidents.incident import Incident
from lit_stability.incidents.record_check import problem_of
from lit_stability.redaction import redacted_tree

SCHEMA = 1
"""Version of the line format; `read_incidents` rejects newer ones."""


NAME = "incidents.jsonl"
"""Name of the file in the folder of a run."""


class IncidentRecord:
    """Appends incidents to ``incidents.jsonl``, which is created at the first one.

    Args:
        path: the file. Lines already in it are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Literal["open", "close"], incident: Incident) -> None:
        """Writes one line and flushes it to disk.

        Args:
            event: why the incident is recorded.
            incident: to record.

        Raises:
            OSError: if the file cannot be written.
        """
        self.append_lines([self.line(event, incident)])

    @staticmethod
    def line(event: Literal["open", "close"], incident: Incident) -> dict[str, Any]:
        """Returns the line of an incident, as it is now."""
        return {"schema": SCHEMA, "event": event, **incident.as_dict()}

    def append_lines(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Writes lines and flushes them to disk; returns True.

        Raises:
            OSError: if the file cannot be written; it may have some of the lines then.
        """
        append_lines(self.path, lines)
        return True


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a file as lines of JSON and flushes them to disk.

    Args:
        path: the file; created with its folder if missing.
        rows: names and values of each.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A path that is not valid UTF-8 contains lone surrogates: they become JSON escapes.
    text = "".join(to_json(redacted_tree(dict(row))) + "\n" for row in rows)
    data = text.encode("utf8", errors="backslashreplace")
    with path.open("a+b") as file:
        if _is_cut(file):
            data = b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_incidents(path: str | Path) -> list[dict[str, Any]]:
    """Reads records: the last line of each incident; a line cut by a crash is skipped.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "incidents.jsonl")
    ...     _ = file.write_text("")
    ...     read_incidents(file)
    []

    Args:
        path: an ``incidents.jsonl``, the folder that contains it, or one with the folders of
            several runs, whose incidents are then returned run by run; ``run`` tells them apart.

    Raises:
        FileNotFoundError: if there is no record.
        ValueError: if a line was written by a newer version or is damaged; names file, line and
            field.
    """
    file = Path(path)
    if file.is_dir():
        file = file / NAME
        below = [] if file.exists() else sorted(Path(path).rglob(NAME))
        if below:
            return [incident for each in below for incident in read_incidents(each)]
    incidents: dict[Any, dict[str, Any]] = {}
    for line in _lines(file):
        incidents[line.get("run"), line["id"], line["time"]] = line
    return list(incidents.values())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    # Read as bytes: a line may be cut in the middle of a character.
    rows = file.read_bytes().split(b"\n")
    for number, row in enumerate(rows, 1):
        # After a power failure a file may end in zeros: the size was written, the content was not.
        if not row.strip(b"\0 \r"):
            continue
        try:
            line = json.loads(row)
        except (ValueError, RecursionError) as error:
            if number == len(rows) or row.count(b"{") != row.count(b"}"):
                continue
            raise ValueError(f"{file}:{number} is damaged, not valid JSON: {row[:80]!r}") from error
        yield _checked(line, f"{file}:{number}")


def _checked(line: Any, where: str) -> dict[str, Any]:
    """Returns a line with its numbers converted.

    Raises:
        ValueError: if it is from a newer version, or not an incident.
    """
    schema = line.get("schema", 0) if isinstance(line, dict) else 0
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(
            f"{where} has schema {schema!r}, this version reads up to {SCHEMA}; upgrade "
            "lit-stability"
        )
    problem = problem_of(line)
    if problem is not None:
        raise ValueError(f"{where} is damaged: {problem}")
    layers = [[name, _number(value)] for name, value in line.get("layers", [])]
    return {key: _number(value) for key, value in line.items()} | {"layers": layers}


def _is_cut(file: BinaryIO) -> bool:
    """Returns whether the last line has no newline, which the next one must then start with."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def to_json(value: Any) -> str:
    """Returns JSON on one line; NaN and Inf, which JSON lacks, become strings."""
    return json.dumps(_jsonable(value), ensure_ascii=False, allow_nan=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
