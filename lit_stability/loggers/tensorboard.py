"""TensorBoard, and every logger whose experiment has ``add_text``: a report in the Text tab.

Imports neither torch nor TensorBoard.
"""

from __future__ import annotations

from typing import Any

from lit_stability.incidents import Incident
from lit_stability.loggers.adapter import LoggerAdapter


class TensorBoardAdapter(LoggerAdapter):
    """Writes each incident as text, ``stability/incident_<id>``."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Returns whether the experiment of a logger takes text."""
        return callable(getattr(logger.experiment, "add_text", None))

    def text(self, incident: Incident, report: str, step: int) -> None:
        """Writes the report and flushes the event file, as the job may be killed."""
        experiment = self.logger.experiment
        experiment.add_text(f"stability/incident_{incident.id}", report, step)
        experiment.flush()
