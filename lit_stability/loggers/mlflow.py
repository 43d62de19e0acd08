"""MLflow: reports as text artifacts, a table artifact, and tags.

Imports nothing of MLflow. Each call waits for the tracking server, so all are made in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_stability.incidents import Incident
from lit_stability.incidents.log import to_json
from lit_stability.loggers.adapter import LoggerAdapter, class_names
from lit_stability.loggers.rows import COLUMNS

TABLE = "stability/incidents.json"
"""Path of the table among the artifacts of the run."""
_TABLES = "mlflow.loggedArtifacts"
"""Tag in which MLflow looks for tables, see ``MlflowClient.log_table``, which needs pandas."""


class MlflowAdapter(LoggerAdapter):
    """Writes ``stability/incident_<id>.md``, the table of all incidents, and tags."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Returns whether it is Lightning's `MLFlowLogger`."""
        return "MLFlowLogger" in class_names(logger)

    def text(self, incident: Incident, report: str, step: int) -> None:
        """Writes the report; that of the closed incident replaces that of the open one."""
        file = f"stability/incident_{incident.id}.md"
        self._later(lambda client, run: client.log_text(run, report, file))

    def table(self, rows: Sequence[Mapping[str, Any]], step: int, *, last: bool) -> None:
        """Writes the table in the form that ``mlflow.load_table`` reads."""
        data = [[row[column] for column in COLUMNS] for row in rows]
        content = to_json({"columns": list(COLUMNS), "data": data})
        tables = json.dumps([{"path": TABLE, "type": "table"}])

        def write(client: Any, run: str) -> None:
            client.log_text(run, content, TABLE)
            client.set_tag(run, _TABLES, tables)

        self._later(write)

    def status(self, values: Mapping[str, Any]) -> None:
        """Writes the values as tags ``stability.<name>``."""

        def write(client: Any, run: str) -> None:
            for key, value in values.items():
                client.set_tag(run, f"stability.{key}", str(value))

        self._later(write)

    def upload(self, incident: Incident) -> None:
        """Uploads the folder to ``stability/incident_<id>``."""
        folder, path = str(incident.path), f"stability/incident_{incident.id}"
        self._later(lambda client, run: client.log_artifacts(run, folder, path))

    def _later(self, write: Callable[[Any, str], object]) -> None:
        logger = self.logger
        self.later(lambda: write(logger.experiment, logger.run_id))
