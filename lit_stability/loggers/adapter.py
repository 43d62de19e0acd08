"""The protocol between the suite and a logger, and which adapter a logger gets.

Imports neither torch nor Lightning nor any logger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_stability.background import Background
from lit_stability.incidents import Incident


class LoggerAdapter:
    """Writes incidents to one logger, in the way in which that logger shows them best.

    A subclass overrides `accepts` and what its logger has a place for; the other methods do
    nothing. A method may raise: that is logged once, the fit goes on, and the next call is made
    again. What asks a network and waits for its answer belongs into `later`.

    Args:
        logger: Lightning's logger.
        background: makes the calls of `later`; None to make them at once.
    """

    def __init__(self, logger: Any, background: Background | None) -> None:
        self.logger, self._background = logger, background

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Returns whether this adapter is for a logger."""
        return False

    def text(self, incident: Incident, report: str, step: int) -> None:
        """Writes the report of an incident that was opened, was closed or has changed.

        Args:
            incident: the incident.
            report: its report in Markdown.
            step: the loggers' own step.
        """

    def table(self, rows: Sequence[Mapping[str, Any]], step: int, *, last: bool) -> None:
        """Writes all incidents of the fit so far; called after each change, and at the end.

        Args:
            rows: one for each incident, with the keys `lit_stability.loggers.rows.COLUMNS`.
            step: the loggers' own step.
            last: whether the fit is over.
        """

    def status(self, values: Mapping[str, Any]) -> None:
        """Writes what a list of runs is searched by; called with `table`.

        Args:
            values: ``incident_count``, ``causes`` and ``stopped``.
        """

    def alert(self, title: str, text: str, *, urgent: bool) -> None:
        """Notifies the user that an incident has opened, or that the fit was stopped (urgent)."""

    def upload(self, incident: Incident) -> None:
        """Uploads the folder of an incident that is closed; called only if it is asked for."""

    def later(self, call: Callable[[], object]) -> None:
        """Makes a call in a thread, in the order of the calls, and again if it fails."""
        if self._background is None:
            call()
        else:
            self._background.call(f"{type(self.logger).__name__} does not take an incident", call)


def class_names(logger: Any) -> set[str]:
    """Returns the names of the classes of a logger, so that none need be imported to ask."""
    return {kind.__name__ for kind in type(logger).__mro__}


_ADAPTERS: list[type[LoggerAdapter]] = []
"""The adapters, those that were registered last first."""


def register_adapter(adapter: type[LoggerAdapter]) -> None:
    """Adds an adapter; it comes before those that were there."""
    _ADAPTERS.insert(0, adapter)


def adapter_of(logger: Any, background: Background | None) -> LoggerAdapter:
    """Returns the adapter of a logger; one that writes nothing if there is none for it.

    Args:
        logger: Lightning's logger.
        background: see `LoggerAdapter`.
    """
    found = next((each for each in _ADAPTERS if each.accepts(logger)), LoggerAdapter)
    return found(logger, background)
