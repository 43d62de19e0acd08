"""An incident as a row of a table, and a fit as values to search for.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_stability.incidents import Incident
from lit_stability.incidents.report import responses_text

COLUMNS = (
    *("run", "id", "time", "step", "epoch", "batch", "kind", "cause", "origin"),
    *("occurrences", "response", "outcome", "message", "folder"),
)
"""Columns of the table. ``time`` is in seconds since 1970."""


def row_of(incident: Incident) -> dict[str, Any]:
    """Returns an incident as a row, with plain values.

    Args:
        incident: open or closed.
    """
    folder = incident.path or ""
    return {
        "run": incident.run,
        "id": incident.id,
        "time": incident.started,
        "step": incident.first.step,
        "epoch": incident.epoch,
        "batch": incident.batch_idx,
        "kind": incident.first.kind,
        "cause": incident.cause or "unknown",
        "origin": incident.origin.describe().splitlines()[0] if incident.origin else "",
        "occurrences": incident.occurrences,
        "response": responses_text(incident) or "nothing changed",
        "outcome": incident.outcome,
        "message": incident.first.message,
        "folder": f"{folder} (pruned)" if incident.pruned else folder,
    }


def status_of(incidents: Sequence[Incident]) -> dict[str, Any]:
    """Returns the number of incidents, their causes, and whether the fit was stopped.

    Args:
        incidents: of a fit.
    """
    causes = dict.fromkeys(incident.cause or "unknown" for incident in incidents)
    return {
        "incident_count": len(incidents),
        "causes": "; ".join(causes),
        "stopped": any(incident.outcome == "stopped" for incident in incidents),
    }
