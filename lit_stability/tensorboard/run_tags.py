"""Checks what a run has in its event file, so that a damaged run cannot disturb the others.

Event files may have been cut, edited, or written by other programs that use the same tags. After
these checks the types of metadata, rows and incidents are as `lit_stability.tensorboard.tags`
describes them. Imports neither torch nor TensorBoard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_stability.incidents.record_check import FIELDS as INCIDENT_FIELDS
from lit_stability.incidents.record_check import problem_of
from lit_stability.incidents.step_history import FIELDS
from lit_stability.tensorboard.tags import INCIDENTS, LAYERS, SCHEMA, STATUS, STATUS_SCHEMA, STEPS

_LARGEST = 2**53
"""Largest step that a float64 holds exactly."""


@dataclass(frozen=True)
class RunTags:
    """The tags of a run that can be read, with their metadata."""

    about: Mapping[str, Mapping[str, Any]]
    damaged: Mapping[str, str]
    """Tag -> why it cannot be read, for the others."""
    newer: bool = False
    """Whether some tags were written by a newer version; they are in neither mapping."""

    @property
    def problem(self) -> str | None:
        """What is wrong with the data of the run, in one line; None for nothing."""
        if not self.damaged:
            return None
        tag, reason = next(iter(self.damaged.items()))
        others = len(self.damaged) - 1
        more = f" (and {others} more)" if others else ""
        return f"{tag} is damaged: {reason}{more}"


def read_tags(contents: Mapping[str, bytes]) -> RunTags:
    """Reads the metadata of the tags of a run.

    Args:
        contents: tag -> the metadata of its first sample, as JSON.

    >>> tags = read_tags({"stability/steps": b'{"schema": 1}', "stability/layers/x/1": b"[]"})
    >>> list(tags.about), tags.problem
    (['stability/steps'], 'stability/layers/x/1 is damaged: its metadata is a list')
    """
    about: dict[str, Mapping[str, Any]] = {}
    damaged: dict[str, str] = {}
    newer = False
    for tag, content in contents.items():
        found = _parsed(content)
        problem = found if isinstance(found, str) else _problem_of(tag, found)
        if problem is not None:
            damaged[tag] = problem
        elif isinstance(found, dict) and found.get("schema", 0) > _newest_schema(tag):
            newer = True
        elif isinstance(found, dict):
            about[tag] = found
    return RunTags(about, damaged, newer)


def whole_rows(data: Iterable[Any], width: int, *, steps: bool = False) -> list[Any]:
    """Returns the samples that are rows of numbers; others are left out.

    Args:
        data: samples of a data provider.
        width: number of values in a row.
        steps: whether the second value must be a step.
    """
    return [datum for datum in data if _is_row(datum.numpy, width, steps)]


def read_incident(value: Any) -> dict[str, Any] | str:
    """Returns the known fields of an incident; or the problem, if it is damaged.

    Args:
        value: the array of a sample, which should hold one string of JSON.

    >>> import numpy as np
    >>> read_incident(np.array(b'{"id": 1, "time": 2.5, "attempt": 3, "x": [[]]}', dtype=object))
    {'id': 1, 'time': 2.5, 'attempt': 3}
    >>> read_incident(np.array(1.5))
    'it is not a text'
    """
    content = value.item() if value.size == 1 else None
    if not isinstance(content, (bytes, str)):
        return "it is not a text"
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({type(error).__name__})"
    problem = problem_of(found, required=("id", "time", "attempt"))
    if problem is not None:
        return problem
    return {key: item for key, item in found.items() if key in INCIDENT_FIELDS}


def read_status(value: Any) -> dict[str, Any] | None:
    """Returns the status of a run; None if it is damaged.

    Args:
        value: the array of a sample, which should hold one string of JSON.

    >>> import numpy as np
    >>> read_status(np.array(b'{"state": "finished", "step": 9, "time": 2.5}', dtype=object))
    {'state': 'finished', 'step': 9, 'time': 2.5}
    >>> read_status(np.array(1.5))
    """
    content = value.item() if value.size == 1 else None
    found = _parsed(content) if isinstance(content, bytes) and content else None
    if not isinstance(found, dict) or not isinstance(found.get("state"), str):
        return None
    numbers = (found.get("step"), found.get("time"))
    if not all(isinstance(number, (int, float)) for number in numbers):
        return None
    return {key: found[key] for key in ("state", "step", "time")}


def _parsed(content: bytes) -> dict[str, Any] | str:
    """Returns metadata, or why they are damaged; the first version wrote none for incidents."""
    if not content:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"its metadata is not JSON ({type(error).__name__})"
    if not isinstance(found, dict):
        return f"its metadata is a {type(found).__name__}"
    if type(found.get("schema", 0)) is not int:
        return "its schema is not a whole number"
    return found


def _newest_schema(tag: str) -> int:
    return STATUS_SCHEMA if tag == STATUS else SCHEMA


def _problem_of(tag: str, about: Mapping[str, Any]) -> str | None:
    if about.get("schema", 0) > _newest_schema(tag) or tag.startswith((INCIDENTS, STATUS)):
        return None
    if tag.startswith(LAYERS):
        return None if _are_names(about.get("names")) else "names is not a list of layer names"
    if tag.startswith(STEPS):
        checks: dict[str, Callable[[Any], bool]] = {"fields": _are_fields, "precisions": _are_texts}
        wrong = [key for key, check in checks.items() if key in about and not check(about[key])]
        return f"{wrong[0]} is not a list of names" if wrong else None
    return "it has no known tag"


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_names(value: Any) -> bool:
    return _are_texts(value) and len({*value}) == len(value)


def _are_fields(value: Any) -> bool:
    # The page keeps columns by name in one object, next to what these two names mean there.
    taken = {"length", "precisions"}
    return _are_names(value) and tuple(value[:2]) == FIELDS[:2] and not taken & {*value}


def _is_row(values: Any, width: int, steps: bool) -> bool:
    if values.dtype.kind != "f" or values.shape != (width,):
        return False
    return not steps or abs(float(values[1])) < _LARGEST
