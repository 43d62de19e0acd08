"""Attempts at optimizer steps as a fit goes on, from their verdict to the Stability tab.

May import Lightning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lit_stability.incidents import Incident
from lit_stability.incidents.log import to_json
from lit_stability.incidents.step_history import StepHistory, row_of
from lit_stability.measurement.step_stats import StepStats
from lit_stability.tensorboard.tab_writer import StabilityTab
from lit_stability.trainer_internals import is_skipped
from lit_stability.training_state.gradient_clipping import clip_threshold


@dataclass(frozen=True)
class PendingAttempt:
    """An attempt whose batch is not over."""

    attempt: int
    stats: StepStats
    optimizer: Optimizer
    taken: bool
    due: bool
    """Whether it is to be written."""


class StepHistoryWriter:
    """Counts the attempts, on all ranks alike, and on the first writes what became of them.

    Written are the steps that other metrics are written for, every attempt that was vetoed, and
    those at which an incident was opened. Their rows are complete only with the end of the batch,
    when everybody has clipped. An incident is written when it has opened, when it has closed, and
    once more with the attempts that followed.

    Args:
        trainer: in its fit.
        attempts: the count, which outlives the fit.
    """

    def __init__(self, trainer: Trainer, history: StepHistory) -> None:
        self._trainer, self._history = trainer, history
        history.start()
        self._tab = StabilityTab(trainer.loggers if trainer.is_global_zero else [])
        self._judged: list[PendingAttempt] = []
        self._due = False
        self._told: list[Incident] = []
        """Opened or closed in the batch at hand."""
        self._incidents: dict[int, Incident] = {}
        """Whose episodes are not complete."""
        self._scans: dict[int, StepStats] = {}
        """The last of each optimizer that was not written yet."""

    def due(self) -> None:
        """The step that is being judged is to be written."""
        self._due = True

    def judged(self, stats: StepStats, optimizer: Optimizer) -> None:
        """Take up an attempt, once it is known whether it was vetoed, before the update.

        Args:
            stats: its measurement.
            optimizer: whose step it is.
        """
        self._history.went_back(stats.step)
        attempt, due = self._history.begin(), self._due
        self._due = False
        if not self._tab:
            return
        if stats.weight_moves is not None:
            self._scans[stats.optimizer] = stats
        taken = not is_skipped(optimizer)
        due = due or not taken or any(i.outcome == "open" for i in self._told)
        self._note_told(attempt)
        self._judged.append(PendingAttempt(attempt, stats, optimizer, taken, due))

    def told(self, incident: Incident) -> None:
        """An incident has opened or closed."""
        if self._tab:
            self._told.append(incident)
            self._incidents[incident.id] = incident

    def went_back(self) -> None:
        """A snapshot was put back."""
        self._history.went_back(self._trainer.global_step)

    def batch_ended(self) -> None:
        """Write what is due, now that rows are complete."""
        judged, self._judged = self._judged, []
        if not self._tab:
            return
        for each in judged:
            self._take_up(each)
        self._note_told(self._history.count)
        told, self._told = self._told, []
        for incident in told:
            self._write(incident)
        self._finish_episodes(everything=False)

    def end(self) -> None:
        """The fit is over."""
        self.batch_ended()
        self._finish_episodes(everything=True)

    def _take_up(self, judged: PendingAttempt) -> None:
        stats = judged.stats
        row = row_of(
            judged.attempt,
            stats,
            clip_threshold=self._threshold(judged),
            precision=str(self._trainer.precision),
            taken=judged.taken,
        )
        self._history.add(row)
        if judged.due:
            self._tab.write_step_attempt(row, stats, self._scans.pop(stats.optimizer, None))

    def _threshold(self, judged: PendingAttempt) -> float | None:
        """What callbacks have clipped to and what the Trainer has; None where nobody clips."""
        own = clip_threshold(judged.optimizer, judged.stats)
        value, algorithm = self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        if not value or (algorithm is not None and str(algorithm).lower().endswith("value")):
            return own
        return min(float(value), math.inf if own is None else own)

    def _note_told(self, attempt: int) -> None:
        """Note at which attempt an incident has opened or closed."""
        for incident in self._told:
            window = self._history.windows.get(incident.id)
            if window is None:
                window = self._history.open(incident.id, attempt)
            if incident.outcome != "open" and window.closed_attempt is None:
                window.closed_attempt = attempt

    def _write(self, incident: Incident) -> None:
        window, attempt = self._history.windows[incident.id], self._history.count
        self._tab.write_incident(
            incident.id,
            incident.started,
            attempt,
            lambda: to_json({**incident.as_dict(), **window.as_dict()}),
        )

    def _finish_episodes(self, *, everything: bool) -> None:
        """Write for the last time the incidents that enough attempts have followed."""
        for key, window in [*self._history.windows.items()]:
            if window.complete or everything:
                self._write(self._incidents.pop(key))
                del self._history.windows[key]
