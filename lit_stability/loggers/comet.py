"""Comet: reports as text, a table at the end, and tags.

Imports nothing of Comet, whose own threads send what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_stability.incidents import Incident
from lit_stability.loggers.adapter import LoggerAdapter, class_names
from lit_stability.loggers.rows import COLUMNS

TABLE = "incidents.csv"


class CometAdapter(LoggerAdapter):
    """Writes reports to the tab *Text*, and ``incidents.csv`` to *Assets*."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Returns whether it is Lightning's `CometLogger`."""
        return "CometLogger" in class_names(logger)

    def text(self, incident: Incident, report: str, step: int) -> None:
        """Writes the report."""
        about = {"incident": incident.id, "outcome": incident.outcome}
        self.logger.experiment.log_text(report, step=step, metadata=about)

    def table(self, rows: Sequence[Mapping[str, Any]], step: int, *, last: bool) -> None:
        """Writes the table when the fit is over: Comet keeps each version as another asset."""
        if last:
            data = [[row[column] for column in COLUMNS] for row in rows]
            self.logger.experiment.log_table(TABLE, tabular_data=data, headers=list(COLUMNS))

    def status(self, values: Mapping[str, Any]) -> None:
        """Writes the values among *Other*, and adds tags."""
        experiment = self.logger.experiment
        for key, value in values.items():
            experiment.log_other(f"stability/{key}", value)
        if values["incident_count"]:
            experiment.add_tag("stability: incident")
        if values["stopped"]:
            experiment.add_tag("stability: stopped")
