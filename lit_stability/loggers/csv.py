"""CSV: ``incidents.csv`` beside Lightning's ``metrics.csv``.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_stability.loggers.adapter import LoggerAdapter, class_names
from lit_stability.loggers.rows import COLUMNS
from lit_stability.training_state.atomic_write import write_atomically

NAME = "incidents.csv"


class CsvAdapter(LoggerAdapter):
    """Writes a row for each incident; rows of other runs in the file stay."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Returns whether it is Lightning's `CSVLogger`, with a local folder."""
        return "CSVLogger" in class_names(logger) and "://" not in str(logger.log_dir)

    def table(self, rows: Sequence[Mapping[str, Any]], step: int, *, last: bool) -> None:
        """Writes the whole file again."""
        file = Path(self.logger.log_dir) / NAME
        own = {(str(row["run"]), str(row["id"])) for row in rows}
        others = [row for row in _rows_in(file) if (row.get("run"), row.get("id")) not in own]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*others, *rows])
        file.parent.mkdir(parents=True, exist_ok=True)
        content = text.getvalue().encode("utf8", "backslashreplace")
        write_atomically(file, content, partial=f".{NAME}.partial")


def _rows_in(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf8") as stream:
        return list(csv.DictReader(stream))
