"""W&B: one table of incidents, alerts, a summary, tags, and incident folders as artifacts.

Imports wandb only to upload a folder. W&B's own process sends everything else: no call waits for
the network.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from lit_stability.background import Background
from lit_stability.incidents import Incident
from lit_stability.loggers.adapter import LoggerAdapter, class_names
from lit_stability.loggers.rows import COLUMNS

TABLE = "stability/incident_table"
"""Key of the table; ``stability/incidents`` is the number of them, and a key has one type."""
_EVERY = 60.0
"""Seconds between tables: each has all rows."""
_SILENT = 300.0
"""Seconds in which no second alert of the same title is sent, by this process and by W&B."""


class TableAdapter(LoggerAdapter):
    """Writes a table with one row for each incident to a logger with a ``log_text`` of rows."""

    _written = -float("inf")

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Returns whether a logger's ``log_text`` takes rows."""
        log_text = getattr(logger, "log_text", None)
        wanted = {"columns", "data", "step"}
        return callable(log_text) and wanted <= {*signature(log_text).parameters}

    def table(self, rows: Sequence[Mapping[str, Any]], step: int, *, last: bool) -> None:
        """Writes the table, once a minute at most, and at the end."""
        now = time.monotonic()
        if last or now - self._written >= _EVERY:
            self._written = now
            data = [[row[column] for column in COLUMNS] for row in rows]
            self.logger.log_text(key=TABLE, columns=list(COLUMNS), data=data, step=step)


class WandbAdapter(TableAdapter):
    """Writes the table, alerts of opening and stop, and what a list of runs is searched by."""

    def __init__(self, logger: Any, background: Background | None) -> None:
        super().__init__(logger, background)
        self._alerted: dict[str, float] = {}
        """Title -> when the last alert of it was sent, in seconds of the monotonic clock."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Returns whether it is Lightning's `WandbLogger`."""
        return "WandbLogger" in class_names(logger)

    def status(self, values: Mapping[str, Any]) -> None:
        """Writes the values to the summary, and adds tags."""
        run = self.logger.experiment
        run.summary.update({f"stability/{key}": v for key, v in values.items()})
        tags = ["stability: incident"] if values["incident_count"] else []
        tags += ["stability: stopped"] if values["stopped"] else []
        run.tags = tuple(dict.fromkeys((*(run.tags or ()), *tags)))

    def alert(self, title: str, text: str, *, urgent: bool) -> None:
        """Sends an alert, one of a title every five minutes at most."""
        now, level = time.monotonic(), "ERROR" if urgent else "WARN"
        if now - self._alerted.get(title, -_SILENT) < _SILENT:
            return
        self._alerted[title] = now
        self.logger.experiment.alert(title=title, text=text, level=level, wait_duration=_SILENT)

    def upload(self, incident: Incident) -> None:
        """Logs the folder as an artifact of type ``incident``; its files are read in a thread."""

        def log_folder() -> None:
            import wandb

            run = self.logger.experiment
            artifact = wandb.Artifact(f"incident-{run.id}-{incident.id}", type="incident")
            artifact.add_dir(str(incident.path))
            run.log_artifact(artifact)

        self.later(log_folder)
