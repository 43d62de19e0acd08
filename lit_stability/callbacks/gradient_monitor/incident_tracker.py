"""Opens incidents, records their recurrences, and closes them.

May import Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_stability.callbacks.gradient_monitor.reporter import Reporter
from lit_stability.callbacks.hooks import call_hook
from lit_stability.detectors import Anomaly, Vote
from lit_stability.incidents import Incident, Outcome
from lit_stability.incidents.console_lines import place_of
from lit_stability.incidents.learning import LossLevels
from lit_stability.incidents.recurrence import same_place, same_sample
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import AcceptNewRegime, describe
from lit_stability.trainer_internals import batch_index

_OVER = ("recovered", "contained", "handled")
"""Outcomes of an incident that is over, unless it recurs at the same place."""


class IncidentTracker:
    """The incidents of a fit, of which at most one is open.

    Args:
        reporter: reports to the console, the record and the loggers; None before a fit.
        close_after: healthy steps that close an incident.
        count: incidents of the run before this fit.
    """

    def __init__(self, reporter: Reporter | None, close_after: int, count: int) -> None:
        self.reporter, self.close_after, self.count = reporter, close_after, count
        self.incidents: list[Incident] = []
        self.current: Incident | None = None
        self.losses = LossLevels(from_start=True)
        self._healthy = 0

    def recur(self, trainer: Trainer, anomaly: Anomaly) -> Incident:
        """Opens an incident for an anomaly, or adds the anomaly to the open one."""
        self._healthy = 0
        if self.current is not None:
            self.current.recur(anomaly)
            return self.current
        self.count += 1
        self.current = Incident(
            self.count,
            anomaly,
            epoch=trainer.current_epoch,
            batch_idx=batch_index(trainer),
            run="" if self.reporter is None else self.reporter.run,
            record=None if self.reporter is None else self.reporter.record_path,
        )
        self.current.before = self.losses.now
        self.incidents.append(self.current)
        return self.current

    def report(self) -> None:
        """Reports the response to the latest anomaly of the open incident."""
        incident, earlier = self.current, self.incidents[:-1]
        if incident is None or self.reporter is None:
            return
        if incident.occurrences > 1:
            self.reporter.continued(incident)
            return
        incident.same_sample_as = same_sample(incident, earlier)
        known = incident.cause or incident.origin is not None
        place = place_of(incident)
        alike = (each for each in earlier if known and place_of(each) == place)
        self.reporter.opened(incident, next(alike, None))

    def healthy(self, trainer: Trainer, pl_module: LightningModule, stats: StepStats) -> None:
        """Counts a healthy step; ``close_after`` of them in a row close the open incident."""
        self._healthy += 1
        if stats.has_loss:
            self.losses.add(stats.step, stats.loss)
        if self._healthy % self.close_after == 0:
            self._look_at_contained(trainer, pl_module)
        if self.current is None or self._healthy < self.close_after:
            return
        # After a rollback the run passes the step of the anomaly again: it is open until then.
        if stats.step >= self.current.anomaly.step + self.close_after:
            self.close(trainer, pl_module, self._outcome_of(self.current))

    def _outcome_of(self, incident: Incident) -> Outcome:
        """Returns the outcome of an incident after enough healthy steps."""
        if not incident.responses:
            return "observed"
        incident.after = self.losses.since(incident.anomaly.step)
        return "recovered" if self._learns(incident) else "contained"

    def _learns(self, incident: Incident) -> bool:
        if describe(AcceptNewRegime()) in incident.responses:  # its losses cannot be compared
            return True
        return self.losses.learns(incident.after, incident.before, lowered=incident.lowered)

    def _look_at_contained(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Corrects the outcome of incidents after which the run has begun to learn."""
        for each in self.incidents:
            if each.outcome == "contained":
                each.after = self.losses.now
                if self._learns(each):
                    each.closed_step = trainer.global_step
                    self._amend(trainer, pl_module, each, "recovered")

    def end(self, trainer: Trainer, pl_module: LightningModule, *, stopped: bool = False) -> None:
        """Closes the open incident at the end of the fit.

        Args:
            trainer: in its fit.
            pl_module: the module in training.
            stopped: whether the fit was ended because of it.
        """
        self._look_at_contained(trainer, pl_module)
        outcome: Outcome = "stopped" if stopped else "unresolved"
        if not stopped and self._healthy and self.current is not None:
            outcome = "handled" if self.current.responses else "observed"
        self.close(trainer, pl_module, outcome)

    def close(self, trainer: Trainer, pl_module: LightningModule, outcome: Outcome) -> None:
        """Closes the open incident, if there is one, and calls ``on_incident_closed``."""
        incident, self.current = self.current, None
        if incident is None:
            return
        if outcome in _OVER:
            incident.repeats = same_place(incident, self.incidents[:-1])
            outcome = "recurring" if incident.repeats else outcome
        incident.close(outcome, trainer.global_step)
        if self.reporter is not None:
            self.reporter.closed(incident)
        for each in incident.repeats:
            if each.outcome in _OVER:
                self._amend(trainer, pl_module, each, "recurring")
        call_hook("on_incident_closed", trainer, pl_module, incident)
        incident.seal()

    def _amend(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident, outcome: Outcome
    ) -> None:
        """Corrects the outcome of an incident that is closed."""
        incident.outcome = outcome
        if self.reporter is not None:
            self.reporter.amended(incident)
        call_hook("on_outcome_changed", trainer, pl_module, incident)


@dataclass(frozen=True)
class PendingVerdict:
    """A step whose votes are still being exchanged between the ranks."""

    stats: StepStats
    anomaly: Anomaly | None
    """What the detectors of this rank found."""

    @property
    def vote(self) -> Vote:
        """The vote of this rank."""
        warned = self.anomaly is not None and self.anomaly.warn_only
        return Vote(self.anomaly is not None and not warned, self.stats.grad_norm, warned)
