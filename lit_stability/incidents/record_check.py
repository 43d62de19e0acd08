"""Checks that a value read from a file has the shape of an incident.

A record may have been damaged by a full disk, edited, or written by another program. What reads it
can rely on the types of the known fields after this check. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _pair_of(first: Check, second: Check) -> Check:
    return lambda value: (
        isinstance(value, list) and len(value) == 2 and first(value[0]) and second(value[1])
    )


def _mapping_with(**checks: Check) -> Check:
    """Returns a check of mappings; keys without an own check must have plain values."""

    def check(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            checks.get(key, _is_plain)(item) for key, item in value.items()
        )

    return check


def _is_plain(value: Any) -> bool:
    return _is_text(value) or _is_number(value)


def _is_window(value: Any) -> bool:
    """Returns whether the value is a table: names of its columns, and rows of that length."""
    if not isinstance(value, Mapping):
        return False
    fields, rows = value.get("fields"), value.get("rows")
    if not isinstance(fields, list) or not all(map(_is_text, fields)):
        return False
    row_fits = _list_of(_is_number)
    return isinstance(rows, list) and all(row_fits(r) and len(r) == len(fields) for r in rows)


_TEXTS = (_list_of(_is_text), "a list of texts")
_TEXT = (_is_text, "a text")
_NUMBER = (_is_number, "a number")
_WHOLE = (_is_whole, "a whole number")
_INPUT = _mapping_with(shape=_list_of(_is_number))

FIELDS: dict[str, tuple[Check, str]] = {
    "id": _WHOLE,
    "time": (lambda value: isinstance(value, (int, float)), "a number of seconds"),
    **dict.fromkeys(("schema", "attempt"), _WHOLE),
    **dict.fromkeys(("step", "epoch", "batch_idx", "value", "baseline", "threshold"), _NUMBER),
    **dict.fromkeys(("strikes", "since", "closed_step", "closed_attempt"), _NUMBER),
    **dict.fromkeys(("event", "kind", "signal", "message", "cause", "phase"), _TEXT),
    **dict.fromkeys(("remedy", "path", "run", "verdict", "outcome"), _TEXT),
    "pruned": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("checks", "evidence", "responses"), _TEXTS),
    "samples": (_list_of(_is_number), "a list of numbers"),
    **dict.fromkeys(("batch_size", "same_sample_as", "loss_before", "loss_after"), _NUMBER),
    "layers": (_list_of(_pair_of(_is_text, _is_number)), "a list of [name, number]"),
    "spans": (_list_of(_pair_of(_is_number, _is_number)), "a list of [first, last]"),
    "origin": (
        lambda value: value is None or _mapping_with(inputs=_list_of(_INPUT))(value),
        "null or a mapping of plain values and inputs",
    ),
    "hypotheses": (
        _list_of(_mapping_with(evidence=_list_of(_is_text))),
        "a list of causes with their evidence",
    ),
    "memory": (
        _mapping_with(places=_list_of(_is_text)),
        "a mapping of plain values and a list of places",
    ),
    "cadence": (_mapping_with(), "a mapping of plain values"),
    "window": (_is_window, "fields and rows of the same length"),
}
"""Known fields: their check, and what is expected in words."""


def problem_of(found: Any, required: tuple[str, ...] = ("id", "time")) -> str | None:
    """Returns the first problem of a value that should be an incident; None if it has none.

    Args:
        found: the parsed JSON. Unknown fields may have any value.
        required: fields that must exist.

    >>> problem_of({"id": 1, "time": 1.5, "layers": [["a", "nan"]]})
    >>> problem_of({"id": 1, "time": 1.5, "layers": 5})
    'layers=5, expected a list of [name, number]'
    >>> problem_of({"time": 1.5})
    'it has no id'
    """
    if not isinstance(found, Mapping):
        return f"it is a {type(found).__name__}, expected the fields of an incident"
    missing = next((key for key in required if key not in found), None)
    if missing is not None:
        return f"it has no {missing}"
    for key, (check, expected) in FIELDS.items():
        if key in found and not check(found[key]):
            return f"{key}={_short(found[key])}, expected {expected}"
    return None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer with too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
