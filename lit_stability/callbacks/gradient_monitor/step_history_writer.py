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
from lit_stability.incidents.step_history import Attempts, row_of
from lit_stability.measurement.step_stats import StepStats
from lit_stability.tensorboard.tab_writer import StabilityTab
from lit_stability.trainer_internals import parameters_of
from lit_stability.training_state.gradient_clipping import clip_threshold


@dataclass(frozen=True)
class Judged:
    """An attempt whose batch is not over."""

    attempt: int
    stats: StepStats
    optimizer: Optimizer
    taken: bool
    due: bool
    """Whether it is to be written."""


class AttemptLog:
    """Counts the attempts, on all ranks alike, and on the first writes what became of them.

    Written are the steps that other metrics are written for, every attempt that was vetoed, and
    those at which an incident was opened. Their rows are complete only with the end of the batch,
    when everybody has clipped. An incident is written when it has opened, when it has closed, and
    once more with the attempts that followed.

    Args:
        trainer: in its fit.
        attempts: the count, which outlives the fit.
    """

    def __init__(self, trainer: Trainer, attempts: Attempts) -> None:
        self._trainer, self._attempts = trainer, attempts
        attempts.start()
        self._tab = StabilityTab(trainer.loggers if trainer.is_global_zero else [])
        self._judged: list[Judged] = []
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
        self._attempts.went_back(stats.step)
        attempt, due = self._attempts.begin(), self._due
        self._due = False
        if not self._tab:
            return
        if stats.weight_moves is not None:
            self._scans[stats.optimizer] = stats
        taken = any(p.grad is not None for p in parameters_of(optimizer))
        due = due or not taken or any(i.outcome == "open" for i in self._told)
        self._note_told(attempt)
        self._judged.append(Judged(attempt, stats, optimizer, taken, due))

    def told(self, incident: Incident) -> None:
        """An incident has opened or closed."""
        if self._tab:
            self._told.append(incident)
            self._incidents[incident.id] = incident

    def went_back(self) -> None:
        """A snapshot was put back."""
        self._attempts.went_back(self._trainer.global_step)

    def batch_ended(self) -> None:
        """Write what is due, now that rows are complete."""
        judged, self._judged = self._judged, []
        if not self._tab:
            return
        for each in judged:
            self._take_up(each)
        self._note_told(self._attempts.count)
        told, self._told = self._told, []
        for incident in told:
            self._write(incident)
        self._finish_episodes(everything=False)

    def end(self) -> None:
        """The fit is over."""
        self.batch_ended()
        self._finish_episodes(everything=True)

    def _take_up(self, judged: Judged) -> None:
        stats = judged.stats
        row = row_of(
            judged.attempt,
            stats,
            clip_threshold=self._threshold(judged),
            precision=str(self._trainer.precision),
            taken=judged.taken,
        )
        self._attempts.add(row)
        if judged.due:
            self._tab.write_attempt(row, stats, self._scans.pop(stats.optimizer, None))

    def _threshold(self, judged: Judged) -> float | None:
        """What callbacks have clipped to and what the Trainer has; None where nobody clips."""
        own = clip_threshold(judged.optimizer, judged.stats)
        value, algorithm = self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        if not value or (algorithm is not None and str(algorithm).lower().endswith("value")):
            return own
        return min(float(value), math.inf if own is None else own)

    def _note_told(self, attempt: int) -> None:
        """Note at which attempt an incident has opened or closed."""
        for incident in self._told:
            episode = self._attempts.episodes.get(incident.id)
            if episode is None:
                episode = self._attempts.open(incident.id, attempt)
            if incident.outcome != "open" and episode.closed_attempt is None:
                episode.closed_attempt = attempt

    def _write(self, incident: Incident) -> None:
        episode, attempt = self._attempts.episodes[incident.id], self._attempts.count
        self._tab.write_incident(
            incident.id,
            incident.started,
            attempt,
            lambda: to_json({**incident.as_dict(), **episode.as_dict()}),
        )

    def _finish_episodes(self, *, everything: bool) -> None:
        """Write for the last time the incidents that enough attempts have followed."""
        for key, episode in [*self._attempts.episodes.items()]:
            if episode.complete or everything:
                self._write(self._incidents.pop(key))
                del self._attempts.episodes[key]
