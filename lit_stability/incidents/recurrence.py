"""Tells whether an incident is at the place of earlier ones, so that nothing has recovered.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_stability.incidents.incident import Incident

_OFTEN = 3
"""Incidents of one kind and cause that count as one that recurs, wherever they are."""


def same_place(incident: Incident, earlier: Sequence[Incident]) -> list[Incident]:
    """Returns the earlier incidents that this one repeats; empty if it is a new one.

    The place is the sample, or the operation and source line, that made the NaN or Inf; or else the
    batch, if it is the one of the same index in another epoch. Where neither fits, the third
    incident of the same kind and cause, known or not, counts as a repetition. What did not recur
    when the same steps were run again has no place.

    Args:
        incident: the latest.
        earlier: of the same run, the oldest first.
    """
    if incident.verdict == "transient":
        return []
    alike = [each for each in earlier if _is_alike(incident, each)]
    here = [each for each in alike if _is_here(incident, each)]
    often = [each for each in alike if each.cause == incident.cause]
    return here or (often if len(often) + 1 >= _OFTEN else [])


def same_sample(incident: Incident, earlier: Sequence[Incident]) -> int | None:
    """Returns the number of the first incident that one of the bad samples has made too.

    Args:
        incident: the latest.
        earlier: of the same run, the oldest first.
    """
    own = _digests(incident)
    return next((each.id for each in earlier if own & _digests(each)), None)


def _digests(incident: Incident) -> set[int]:
    return set(getattr(incident.origin, "digests", ()))


def _is_alike(incident: Incident, other: Incident) -> bool:
    return other.first.kind == incident.first.kind and other.verdict != "transient"


def _is_here(incident: Incident, other: Incident) -> bool:
    if _digests(incident) & _digests(other):
        return True
    place = _operation(incident)
    if place is not None and _operation(other) is not None:
        return place == _operation(other)
    return incident.batch_idx == other.batch_idx and incident.epoch != other.epoch


def _operation(incident: Incident) -> tuple[Any, ...] | None:
    """Returns what identifies the operation that made a NaN or Inf."""
    origin = incident.origin
    if origin is None or origin.cause == "input":  # the data differ, the operation does not matter
        return None
    return (origin.op, origin.phase, origin.module, origin.file, origin.line, origin.tensor)
