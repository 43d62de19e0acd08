"""The runs of the corpus, read from ``corpus_1.csv``. Imports only the standard library.

The file is the definition of the corpus and is never changed: other runs are another version.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

VERSION = 1
PATH = Path(__file__).parent / f"corpus_{VERSION}.csv"
CHECKSUM = "c4ad4d73d65b6a53"
"""Start of the SHA-256 of the file."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run of the corpus; the order of the fields is that of the columns."""

    id: str
    source: str
    """Benchmark that defines the run: "rescue", "prediction" or "healthy"."""
    name: str
    """Name of the run there."""
    seed: int
    family: str
    """Family of faults, "diverging", or "healthy"."""
    steps: int
    """Batches of the run without protection."""
    twin: str = ""
    """Identifier of the healthy run that it is judged by; empty for a healthy run."""
    cause: str = ""
    """What makes the run fail; empty for a healthy one."""
    fault: int | None = None
    """First batch with the injected fault; None if the run fails by itself."""
    lost: int | None = None
    """Batch at which the unprotected run is lost, by its loss; None if its loss does not show it.
    Measured on the machine that selected the corpus."""
    quick: bool = False
    """Whether ``--quick`` runs it."""

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong, so that every alarm is false."""
        return not self.cause


def slug(text: str) -> str:
    """Returns a text as a file name.

    >>> slug("clipping at 1.0")
    'clipping-at-1-0'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def id_of(source: str, name: str, seed: int) -> str:
    """Returns the identifier of a run, which is also the name of its file.

    >>> id_of("prediction", "SGD, rate x10", 13)
    'prediction-sgd-rate-x10-13'
    """
    return slug(f"{source} {name} {seed}")


def read(path: Path = PATH) -> list[Entry]:
    """Reads the runs of a corpus."""
    with path.open(encoding="utf8", newline="") as file:
        return [_entry(row) for row in csv.DictReader(file)]


def with_twins(entries: Sequence[Entry], ids: Sequence[str]) -> list[Entry]:
    """Returns the entries with these identifiers, and their twins.

    Raises:
        ValueError: There is no entry with such an identifier.
    """
    known = {entry.id: entry for entry in entries}
    unknown = [id for id in ids if id not in known]
    if unknown:
        raise ValueError(f"there is no run {unknown[0]!r}; the runs are in {PATH.name}")
    wanted = {*ids, *(known[id].twin for id in ids)}
    return [entry for entry in entries if entry.id in wanted]


def write(entries: Sequence[Entry], path: Path = PATH) -> None:
    """Writes the runs of a corpus."""
    with path.open("w", encoding="utf8", newline="") as file:
        columns = [field.name for field in fields(Entry)]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(entry) | {"quick": int(entry.quick)} for entry in entries)


def checksum(path: Path = PATH) -> str:
    """Returns the start of the SHA-256 of a corpus file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _entry(row: dict[str, str]) -> Entry:
    numbers = {name: int(row[name]) if row[name] else None for name in ("fault", "lost")}
    whole = {"seed": int(row["seed"]), "steps": int(row["steps"]), "quick": row["quick"] == "1"}
    texts = {name: row[name] for name in ("id", "source", "name", "family", "twin", "cause")}
    return Entry(**texts, **numbers, **whole)  # type: ignore[arg-type]
