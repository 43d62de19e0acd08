"""Writes every step attempt of a fit, from its verdict to the Stability tab.

May import Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lit_stability.incidents import Incident
from lit_stability.incidents.log import to_json
from lit_stability.incidents.step_history import StepHistory, row_of
from lit_stability.lightning_package import Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.redaction import redacted_tree
from lit_stability.tensorboard.tab_writer import StabilityTab
from lit_stability.tensorboard.tags import RunState
from lit_stability.training_state.gradient_clipping import clip_threshold
from lit_stability.training_state.skipped_step import is_skipped

_FINISHED = 50
"""Incidents whose steps are kept after their last record, for when the incident is amended."""
_ENDS = 100
"""Responses at either end of a long list that go to the tab."""


@dataclass(frozen=True)
class PendingAttempt:
    """A step attempt whose batch is not over."""

    number: int
    stats: StepStats
    optimizer: Optimizer
    taken: bool
    written: bool
    """Whether its row goes to the tab."""
    extra: bool
    """Whether it goes there only because of an incident."""


class StepHistoryWriter:
    """Counts the step attempts on all ranks alike, and writes them on rank 0.

    Written are the steps for which other metrics are written, every attempt that was skipped, and
    those at which an incident was opened. A row is complete only at the end of its batch, when all
    callbacks have clipped. An incident is written when it opens, when it closes, and once more with
    the attempts after it. What incidents add to an event file is limited, see
    `lit_stability.loggers.size_limits`.

    Args:
        trainer: in its fit.
        history: the count, which outlives the fit.
    """

    def __init__(self, trainer: Trainer, history: StepHistory) -> None:
        self._trainer, self._history = trainer, history
        history.start()
        self._started = False
        self._tab = StabilityTab(trainer.loggers if trainer.is_global_zero else [])
        self._pending: list[PendingAttempt] = []
        self._write_current = False
        self._changed: list[Incident] = []
        """Incidents that were opened or closed in the current batch."""
        self._incidents: dict[int, Incident] = {}
        """Incidents whose window is not complete, by id."""
        self._finished: dict[int, dict[str, Any]] = {}
        """Windows of incidents of which the last record was written, by id; old ones without steps.

        An incident that is amended is written again, with the steps that were around it."""
        self._scans: dict[int, StepStats] = {}
        """For each optimizer, its last scan of the weights that was not written yet."""

    def write_current(self) -> None:
        """Has the current step written."""
        self._write_current = True

    def judged(self, stats: StepStats, optimizer: Optimizer) -> None:
        """Adds an attempt, when it is known whether it was skipped, before the update.

        Args:
            stats: its measurement.
            optimizer: whose step it is.
        """
        self._history.rolled_back_to(stats.step)
        number, written = self._history.begin(), self._write_current
        self._write_current = False
        if not self._tab:
            return
        if stats.weight_moves is not None:
            self._scans[stats.optimizer] = stats
        taken = not is_skipped(optimizer)
        opened = any(incident.outcome == "open" for incident in self._changed)
        self._record_changes(number)
        extra = not written and (not taken or opened) and self._tab.has_room
        attempt = PendingAttempt(number, stats, optimizer, taken, written or extra, extra)
        self._pending.append(attempt)

    def incident_changed(self, incident: Incident) -> None:
        """Records an incident that was opened, closed, or amended after that."""
        if self._tab and incident.id in self._finished:
            self._write_with(incident, self._finished[incident.id], last=False)
        elif self._tab:
            self._changed.append(incident)
            self._incidents[incident.id] = incident

    def rolled_back(self) -> None:
        """Records that a snapshot was restored."""
        self._history.rolled_back_to(self._trainer.global_step)

    def batch_ended(self) -> None:
        """Writes the attempts of the batch, now that their rows are complete."""
        pending, self._pending = self._pending, []
        if not self._tab:
            return
        for attempt in pending:
            self._add(attempt)
        if pending and not self._started:
            self._started = True
            self._write_status("running")
        self._record_changes(self._history.count)
        changed, self._changed = self._changed, []
        for incident in changed:
            self._write(incident)
        self._finish_windows(everything=False)

    def end(self, state: RunState) -> None:
        """Writes what is left at the end of the fit.

        Args:
            state: how it ended.
        """
        self.batch_ended()
        self._finish_windows(everything=True)
        self._write_status(state)

    def _write_status(self, state: RunState) -> None:
        self._tab.write_status(state, self._trainer.global_step, self._history.count)

    def _add(self, attempt: PendingAttempt) -> None:
        stats = attempt.stats
        row = row_of(
            attempt.number,
            stats,
            clip_threshold=self._threshold(attempt),
            precision=str(self._trainer.precision),
            taken=attempt.taken,
        )
        self._history.add(row)
        if attempt.written:
            scan = self._scans.pop(stats.optimizer, None)
            self._tab.write_step_attempt(row, stats, scan, extra=attempt.extra)

    def _threshold(self, attempt: PendingAttempt) -> float | None:
        """The norm that callbacks or the Trainer clipped to; None if neither clips."""
        own = clip_threshold(attempt.optimizer, attempt.stats)
        value, algorithm = self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        if not value or (algorithm is not None and str(algorithm).lower().endswith("value")):
            return own
        return min(float(value), math.inf if own is None else own)

    def _record_changes(self, attempt: int) -> None:
        """Record at which attempt incidents were opened or closed."""
        for incident in self._changed:
            window = self._history.windows.get(incident.id)
            if window is None:
                window = self._history.open(incident.id, attempt)
            if incident.outcome != "open" and window.closed_attempt is None:
                window.closed_attempt = attempt

    def _write(self, incident: Incident, *, last: bool = False) -> None:
        around = self._history.windows[incident.id].as_dict()
        self._write_with(incident, around, last=last)
        if last:
            self._finished[incident.id] = around
            for old in list(self._finished)[:-_FINISHED]:
                self._finished[old].pop("window", None)

    def _write_with(self, incident: Incident, around: Mapping[str, Any], *, last: bool) -> None:
        record = redacted_tree(_shortened(incident.as_dict()))
        without_steps = {key: around[key] for key in around if key != "window"}
        self._tab.write_incident(
            incident.id,
            incident.started,
            self._history.count,
            lambda: to_json({**record, **around}),
            lambda: to_json({**record, **without_steps}),
            last=last,
            always=incident.outcome == "stopped",
        )

    def _finish_windows(self, *, everything: bool) -> None:
        """Write for the last time the incidents that enough attempts have followed."""
        for key, window in [*self._history.windows.items()]:
            if window.complete or everything:
                self._write(self._incidents.pop(key), last=True)
                del self._history.windows[key]


def _shortened(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without the middle of a list of responses that is very long."""
    responses = record["responses"]
    more = len(responses) - 2 * _ENDS
    if more <= 0:
        return record
    return record | {"responses": [*responses[:_ENDS], f"{more} more", *responses[-_ENDS:]]}
