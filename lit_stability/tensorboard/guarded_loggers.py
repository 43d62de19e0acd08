"""Calls loggers so that one that raises ends no fit.

A logger may fail at any step: a network that is down, a full disk, a run that was closed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from lit_stability.lightning_choice import suite_logger

log = suite_logger()

_REPORTED: WeakSet[Any] = WeakSet()
"""Loggers that have raised, and of which that was logged."""


def to_each(loggers: Iterable[Any], write: Callable[[Any], bool | None]) -> bool:
    """Calls ``write(logger)`` for each logger; what it raises is logged once for each logger.

    The next value is written again, so that a logger which recovers has only a gap.

    Args:
        loggers: Lightning's loggers.
        write: writes to one of them; may return False if the logger does not take such a value.

    Returns:
        Whether any of them took the value.

    >>> to_each(["a", "b"], lambda logger: logger == "b"), to_each([], print)
    (True, False)
    """
    took = [_wrote(logger, write) for logger in loggers]
    return any(took)


def _wrote(logger: Any, write: Callable[[Any], bool | None]) -> bool:
    try:
        return write(logger) is not False
    except Exception as error:
        if logger not in _REPORTED:
            _REPORTED.add(logger)
            log.warning(
                "%s raised %s: %s; it lacks values of the suite, training continues",
                *(type(logger).__name__, type(error).__name__, error),
            )
        return False
