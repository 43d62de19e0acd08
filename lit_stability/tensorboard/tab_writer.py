"""Writes the data of the Stability tab to the event files of the loggers that have one.

Imports neither torch nor Lightning, and TensorBoard only if a logger writes event files.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from lit_stability.incidents.step_history import FIELDS, PRECISIONS, Row
from lit_stability.lightning_choice import suite_logger
from lit_stability.loggers.size_limits import (
    EXTRA_STEPS,
    MIB,
    WITH_STEPS,
    WITHOUT_STEPS,
    SizeLimit,
    bytes_of,
)
from lit_stability.measurement.step_stats import StepStats, WeightMoves
from lit_stability.outside import guarded, tried
from lit_stability.tensorboard.layout import write_layout
from lit_stability.tensorboard.tags import (
    STATUS,
    STATUS_SCHEMA,
    RunState,
    incident_tag,
    layers_tag,
    metadata,
    steps_tag,
)

log = suite_logger()

_NO_STEPS = (
    f"the incidents of this fit have filled {WITH_STEPS // MIB} MiB of the event file; further "
    "ones are in the Stability tab without the steps around them, and in incidents.jsonl"
)
_NO_RECORD = (
    f"the incidents of this fit have filled {(WITH_STEPS + WITHOUT_STEPS) // MIB} MiB of the event "
    "file; further ones are only in incidents.jsonl"
)
_NO_EXTRA = (
    f"skipped steps of this fit have filled {EXTRA_STEPS // MIB} MiB of the event file; the "
    "Stability tab gets only every log_every_n_steps-th step from here on"
)


class StabilityTab:
    """Writes step attempts and incidents to every logger with a ``SummaryWriter`` as experiment.

    Never raises: a logger that fails is reported once, and has a gap. What incidents add is
    limited, see `lit_stability.loggers.size_limits`.

    Args:
        loggers: Lightning's loggers, any number of them.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self._experiments = {id(e): e for e in map(_experiment, loggers) if _takes_events(e)}
        self._layers: dict[tuple[int, str], tuple[tuple[str, ...], str]] = {}
        """Layer names seen so far and their tag, by optimizer and quantity."""
        self._described: set[str] = set()
        """Tags whose metadata were written."""
        self._full, self._short = SizeLimit(WITH_STEPS), SizeLimit(WITHOUT_STEPS)
        self._extra = SizeLimit(EXTRA_STEPS)
        self._begun: set[str] = set()
        """Tags of incidents of which a record was written, but not yet the last one."""
        self._logged: set[str] = set()
        """Lines that were logged."""
        self._for_each(write_layout)

    def __bool__(self) -> bool:
        return bool(self._experiments)

    @property
    def has_room(self) -> bool:
        """Whether steps are written that are not logged otherwise."""
        if self._extra.reached:
            self._log_once(_NO_EXTRA)
        return not self._extra.reached

    def write_step_attempt(
        self, row: Row, stats: StepStats, scan: StepStats | None, *, extra: bool = False
    ) -> None:
        """Writes a step attempt and its values by layer.

        Args:
            row: in the order of `lit_stability.incidents.step_history.FIELDS`.
            stats: measurement of the attempt.
            scan: the latest measurement of the weights' movement since the last call, if any.
            extra: whether the step is written only because of an incident.
        """

        def build() -> Any:
            event = self._attempt(row, stats, scan)
            self._extra.spend(event.ByteSize() if extra else 0)
            return event

        self._write(build, int(row[0]))

    def write_incident(
        self,
        incident: int,
        started: float,
        attempt: int,
        text: Callable[[], str],
        short: Callable[[], str] | None = None,
        *,
        last: bool = False,
        always: bool = False,
    ) -> None:
        """Writes the current state of an incident, and flushes the event files.

        Args:
            incident: id of the incident.
            started: when it was opened, in seconds since 1970.
            attempt: number of the latest step attempt.
            text: returns the incident as JSON, with the steps around it.
            short: returns it without them, for when there is no room; None for never.
            last: whether only steps were added since the last call, and none will be.
            always: whether at least the short form is written in any case.
        """
        tag = incident_tag(incident, started)

        def build() -> Any:
            content = self._fitting(tag, text, None if last else short, always)
            return None if content is None else self._text(tag, content)

        self._write(build, attempt)
        if last:
            self._begun.discard(tag)
        self._for_each(lambda experiment: experiment.flush())

    def write_status(self, state: RunState, step: int, attempt: int) -> None:
        """Writes whether the run goes on, and flushes the event files.

        Args:
            state: whether it goes on, or how it ended.
            step: number of optimizer steps so far.
            attempt: number of the latest step attempt.
        """
        content = json.dumps({"state": state, "step": step, "time": time.time()})
        self._write(lambda: self._text(STATUS, content, schema=STATUS_SCHEMA), attempt)
        self._for_each(lambda experiment: experiment.flush())

    def _fitting(
        self, tag: str, text: Callable[[], str], short: Callable[[], str] | None, always: bool
    ) -> str | None:
        """Returns the longest form of an incident that there is room for, or None."""
        content = text()
        if self._full.take(bytes_of(content)):
            self._begun.add(tag)
            return content
        self._log_once(_NO_STEPS)
        if short is None:
            return None
        content = short()
        if not self._short.take(bytes_of(content)) and not (always or tag in self._begun):
            self._log_once(_NO_RECORD)
            return None
        self._begun.add(tag)
        return content

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            log.warning("%s", line)

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

    def _text(self, tag: str, content: str, **about: object) -> Any:
        from lit_stability.tensorboard.events import event_of, text

        return event_of([text(tag, content, self._about(tag, **about))])

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
        """Builds an event once and writes it to all, or none if there is none to write.

        If building fails, each of them fails.
        """
        built: list[Any] = []

        def add(experiment: Any) -> None:
            if not built:
                built.append(build())
            if built[0] is not None:
                _file_writer(experiment).add_event(built[0], attempt)

        self._for_each(add)

    def _for_each(self, do: Callable[[Any], object]) -> None:
        def done(experiment: Any) -> bool:
            do(experiment)
            return True

        for experiment in self._experiments.values():
            what = f"{type(experiment).__name__} does not take data of the Stability tab"
            if not guarded(experiment, what, partial(done, experiment)):
                # The first value of a tag has its metadata, and may be what was lost.
                self._described.clear()


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


def _experiment(logger: Any) -> Any:
    what = f"{type(logger).__name__} has no experiment for the Stability tab"
    return guarded(logger, what, lambda: getattr(logger, "experiment", None))


def _takes_events(experiment: Any) -> bool:
    takes, _ = tried(lambda: callable(getattr(_file_writer(experiment), "add_event", None)))
    return bool(takes)


def _file_writer(experiment: Any) -> Any:
    """Returns a ``SummaryWriter``'s own file writer.

    TensorBoard may ignore a second event file in the same folder.
    """
    found = getattr(experiment, "_get_file_writer", None)
    return found() if callable(found) else getattr(experiment, "file_writer", None)
