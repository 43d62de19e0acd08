"""The record of incidents: one JSON line per opening and per closing, and its reader.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lit_stability.incidents.incident import Incident

SCHEMA = 1
"""Version of the lines of ``incidents.jsonl``; a reader refuses newer ones."""


class IncidentRecord:
    """Appends to ``incidents.jsonl``; the file is created at the first incident.

    Args:
        path: the file. Lines already in it are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Literal["open", "close"], incident: Incident) -> None:
        """Write one line and flush it to the disk.

        Raises:
            OSError: if the file cannot be written.
        """
        append_line(self.path, {"schema": SCHEMA, "event": event, **incident.as_dict()})


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file as a line of JSON, and flush it to the disk.

    Args:
        path: created, with its folder, if it is not there.
        row: the names and values.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Lone surrogates, as in the path of an ill-named folder, become their JSON escapes.
    data = (to_json(row) + "\n").encode("utf8", errors="backslashreplace")
    with path.open("a+b") as file:
        if _is_cut(file):
            data = b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_incidents(path: str | Path) -> list[dict[str, Any]]:
    """The incidents of a record, the last line of each; a line cut short by a crash is passed over.

    Args:
        path: an ``incidents.jsonl`` or the folder that holds it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a line was written by a newer version, or is damaged in the middle.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "incidents.jsonl"
    incidents: dict[Any, dict[str, Any]] = {}
    for line in _lines(file):
        incidents[line["id"], line["time"]] = line
    return list(incidents.values())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    # As bytes: a line may have been cut in the middle of a character.
    rows = file.read_bytes().split(b"\n")
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        try:
            line = json.loads(row)
        except ValueError as error:
            if number == len(rows) or row.count(b"{") != row.count(b"}"):
                continue
            raise ValueError(f"{file}:{number} is damaged: {row[:80]!r}") from error
        if line.get("schema", 0) > SCHEMA:
            raise ValueError(
                f"{file}:{number} has schema {line['schema']}, this version reads up to {SCHEMA}; "
                "upgrade lit-stability"
            )
        layers = [[name, _number(value)] for name, value in line.get("layers", [])]
        yield {key: _number(value) for key, value in line.items()} | {"layers": layers}


def _is_cut(file: BinaryIO) -> bool:
    """Whether the last line of a file lacks its end, so that another must not be glued to it."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def to_json(value: Any) -> str:
    """JSON on one line; NaN and Inf, which JSON lacks, become the strings of their names."""
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
