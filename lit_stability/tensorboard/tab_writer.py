"""Writes the data of the Stability tab to the event files of the loggers that have one.

Imports neither torch nor Lightning, and TensorBoard only if a logger writes event files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from lit_stability.incidents.step_history import FIELDS, PRECISIONS, Row
from lit_stability.measurement.step_stats import StepStats, WeightMoves
from lit_stability.tensorboard.layout import write_layout
from lit_stability.tensorboard.tags import incident_tag, layers_tag, metadata, steps_tag

log = logging.getLogger("lightning.pytorch.lit_stability")


class StabilityTab:
    """Writes step attempts and incidents to every logger with a ``SummaryWriter`` as experiment.

    Never raises: a logger that fails is reported once and then ignored.

    Args:
        loggers: Lightning's loggers, any number of them.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self._experiments = {id(e): e for e in map(_experiment, loggers) if _takes_events(e)}
        self._layers: dict[tuple[int, str], tuple[tuple[str, ...], str]] = {}
        """Layer names seen so far and their tag, by optimizer and quantity."""
        self._described: set[str] = set()
        """Tags whose metadata were written."""
        self._for_each(write_layout)

    def __bool__(self) -> bool:
        return bool(self._experiments)

    def write_step_attempt(self, row: Row, stats: StepStats, scan: StepStats | None) -> None:
        """Writes a step attempt and its values by layer.

        Args:
            row: in the order of `lit_stability.incidents.step_history.FIELDS`.
            stats: measurement of the attempt.
            scan: the latest measurement of the weights' movement since the last call, if any.
        """
        self._write(lambda: self._attempt(row, stats, scan), int(row[0]))

    def write_incident(
        self, incident: int, started: float, attempt: int, text: Callable[[], str]
    ) -> None:
        """Writes the current state of an incident, and flushes the event files.

        Args:
            incident: id of the incident.
            started: when it was opened, in seconds since 1970.
            attempt: number of the latest step attempt.
            text: returns the incident as JSON.
        """
        tag = incident_tag(incident, started)
        self._write(lambda: self._incident(tag, text()), attempt)
        self._for_each(lambda experiment: experiment.flush())

    def _attempt(self, row: Row, stats: StepStats, scan: StepStats | None) -> Any:
        from lit_stability.tensorboard.events import doubles, event_of, floats

        tag = steps_tag(stats.optimizer)
        about = self._about(tag, fields=FIELDS, precisions=PRECISIONS)
        values = [doubles(tag, row, about)]
        pairs: dict[str, tuple[tuple[str, ...], Sequence[float]]]
        pairs = {"grad_norm": (stats.names, stats.grad_norms)}
        if scan is not None and scan.weight_moves is not None:
            names = tuple(map(itemgetter(0), scan.weight_norms))
            pairs["update_ratio"] = (names, update_ratios(scan.weight_moves, scan.step))
        for quantity, (names, numbers) in pairs.items():
            known, tag = self._series(stats.optimizer, quantity, names)
            about = self._about(tag, quantity=quantity, names=known)
            values.append(floats(tag, _in_order(known, names, numbers), about))
        return event_of(values)

    def _incident(self, tag: str, content: str) -> Any:
        from lit_stability.tensorboard.events import event_of, text

        return event_of([text(tag, content, self._about(tag))])

    def _series(
        self, optimizer: int, quantity: str, names: tuple[str, ...]
    ) -> tuple[tuple[str, ...], str]:
        """Returns the layers seen so far and their tag.

        A step in which some parameters have no gradient does not change them.
        """
        key = optimizer, quantity
        known, tag = self._layers.get(key, ((), ""))
        if names != known and not set(names) <= set(known):
            known = tuple(dict.fromkeys((*known, *names)))
            tag = layers_tag(optimizer, quantity, known)
            self._layers[key] = known, tag
        return known, tag

    def _about(self, tag: str, **content: object) -> Any:
        """Returns metadata for the first value of a tag, and None for later values."""
        if tag in self._described:
            return None
        from lit_stability.tensorboard.events import metadata_of

        self._described.add(tag)
        return metadata_of(metadata(**content))

    def _write(self, build: Callable[[], Any], attempt: int) -> None:
        """Builds an event once and writes it to all; if building fails, each of them fails."""
        built: list[Any] = []

        def add(experiment: Any) -> None:
            if not built:
                built.append(build())
            _file_writer(experiment).add_event(built[0], attempt)

        self._for_each(add)

    def _for_each(self, do: Callable[[Any], object]) -> None:
        failed = {key: _failure(do, item) for key, item in self._experiments.items()}
        for key, error in failed.items():
            if error is not None:
                log.warning(
                    "writing Stability tab data to %s failed (%s: %s); it gets no more, training "
                    "continues",
                    *(type(self._experiments.pop(key)).__name__, type(error).__name__, error),
                )


def update_ratios(moves: WeightMoves, step: int) -> list[float]:
    """Returns the mean update-to-weight ratio of each weight, per step since the previous scan.

    Computed from the distance between two scans, divided by the number of steps. The distance
    equals the sum of the updates if all point in one direction, and is smaller if they cancel.
    NaN for weights that were zero.

    >>> moves = WeightMoves(
    ...     since=10, norms=(2.0, 0.0), peaks=(), distances=(0.4, 1.0), farthest=())
    >>> update_ratios(moves, 20)
    [0.02, nan]
    """
    steps = max(1, step - moves.since)
    return [
        distance / norm / steps if norm > 0 else math.nan
        for distance, norm in zip(moves.distances, moves.norms, strict=True)
    ]


def _in_order(
    known: tuple[str, ...], names: tuple[str, ...], values: Sequence[float]
) -> Sequence[float]:
    """Returns values in the order of the known layers, NaN for layers without a value."""
    if names == known:
        return values
    by_name = dict(zip(names, values, strict=True))
    return [by_name.get(name, math.nan) for name in known]


def _failure(do: Callable[[Any], object], experiment: Any) -> Exception | None:
    try:
        do(experiment)
    except Exception as error:
        return error
    return None


def _experiment(logger: Any) -> Any:
    try:
        return getattr(logger, "experiment", None)
    except Exception as error:
        log.warning(
            "%s has no experiment (%s); it gets no Stability tab data, training continues",
            *(type(logger).__name__, error),
        )
        return None


def _takes_events(experiment: Any) -> bool:
    try:
        return callable(getattr(_file_writer(experiment), "add_event", None))
    except Exception:
        return False


def _file_writer(experiment: Any) -> Any:
    """Returns a ``SummaryWriter``'s own file writer.

    TensorBoard may ignore a second event file in the same folder.
    """
    found = getattr(experiment, "_get_file_writer", None)
    return found() if callable(found) else getattr(experiment, "file_writer", None)
