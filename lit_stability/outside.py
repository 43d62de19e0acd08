"""Calls what is outside of the program: loggers, disks, networks. What they raise ends no fit.

The one place that catches it. A network may be down, a disk full, a run closed elsewhere, at any
step. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from lit_stability.lightning_choice import suite_logger

log = suite_logger()

T = TypeVar("T")

_REPORTED: dict[tuple[int, str], Callable[[], Any]] = {}
"""Failures that were logged: id of the owner and what failed -> a reference to the owner.

An object need not be hashable to own a failure."""


def tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Calls something outside of the program.

    Args:
        call: the call.

    Returns:
        What it returned, and None; or None, and what it raised.

    >>> tried(lambda: 5)
    (5, None)
    >>> tried(lambda: int("a"))[1]
    ValueError("invalid literal for int() with base 10: 'a'")
    """
    try:
        return call(), None
    except Exception as error:
        return None, error


def guarded(owner: object, what: str, call: Callable[[], T], advice: str = "") -> T | None:
    """Calls something outside of the program; what it raises is logged, once for each owner.

    Nothing is given up: the next call is made again, so that a logger which recovers has only a
    gap.

    Args:
        owner: whose failure it is: a logger, or a callback that writes files.
        what: what fails then, such as ``"the folder of an incident cannot be saved"``; the same
            text for each call, because it decides what was logged before.
        call: the call.
        advice: what the user can do, for the log.

    Returns:
        What the call returned; None if it raised.
    """
    result, error = tried(call)
    if error is not None and _is_new(owner, what):
        log.warning(
            "%s (%s: %s); training continues, and this is logged once%s",
            *(what, type(error).__name__, error, f"; {advice}" if advice else ""),
        )
    return result


def to_each(
    loggers: Iterable[Any], write: Callable[[Any], bool | None], what: str = "values"
) -> bool:
    """Calls ``write(logger)`` for each logger; what it raises is logged once for each logger.

    Args:
        loggers: Lightning's loggers.
        write: writes to one of them; may return False if the logger does not take such a value.
        what: what is written, for the log.

    Returns:
        Whether any of them took the value.

    >>> to_each(["a", "b"], lambda logger: logger == "b"), to_each([], print)
    (True, False)
    """
    took = []
    for logger in loggers:
        failure = f"{type(logger).__name__} does not take {what} of the suite"
        took.append(guarded(logger, failure, partial(_takes, logger, write)))
    return any(took)


def _takes(logger: Any, write: Callable[[Any], bool | None]) -> bool:
    return write(logger) is not False


def _is_new(owner: object, what: str) -> bool:
    """Returns whether a failure was not logged yet, and records that it is now."""
    key = id(owner), what
    known = _REPORTED.get(key)
    if known is not None and known() is owner:
        return False
    try:
        _REPORTED[key] = weakref.ref(owner, lambda _: _REPORTED.pop(key, None))
    except TypeError:  # such as a list: kept, so that its id is not used again
        _REPORTED[key] = lambda: owner
    return True
