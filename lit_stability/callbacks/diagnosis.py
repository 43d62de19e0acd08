"""`Diagnosis`: finds the likely causes of an incident, on which the response depends."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import gather_of, require_monitor
from lit_stability.checks.preflight.inputs import check_batch
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.diagnosis import DiagnosisContext
from lit_stability.diagnosis.training_phases import PhaseRanges
from lit_stability.incidents import Incident
from lit_stability.measurement.step_stats import StepStats
from lit_stability.trainer_internals import callbacks_of


class Diagnosis(StabilityCallback):
    """Ranks the likely causes of each incident, with evidence, remedies, and when to ignore them.

    The causes are entries of `lit_stability.diagnosis.CAUSES`; `register_cause` adds your own.
    Their score depends on the loss pattern, the gradients compared with earlier steps, the most
    affected layers, the phase of the run, the batch, the operation that a `NonFiniteLocator` found,
    whether the fault recurred when the step was retried, and probe readings. The cause with the
    best score is shown in the console line and in ``incident.cause``; the record and the report
    list all of them.

    The cause also influences the response. If the learning rate is likely too high, the first
    rollback lowers it, without first retrying at the same rate. If the architecture is certain to
    be the cause (collapsed attention, a gain of zero), no later step can help, and the fit stops
    with the diagnosis.

    Place it before the callbacks that respond. Healthy steps cost some microseconds.

    Args:
        history: number of accepted steps kept for comparison.
        stop: whether a certain architectural cause ends the fit; it is reported in any case.

    Raises:
        ValueError: if ``history`` is less than 20.
    """

    ignores_skipped_steps = True

    def __init__(self, *, history: int = 100, stop: bool = True) -> None:
        if history < 20:
            raise ValueError(f"history must be at least 20 steps, got {history!r}")
        self.stop = stop
        self._history: deque[StepStats] = deque(maxlen=history)
        self._phases = PhaseRanges()
        self._batch: Any = None

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_batch": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a fit in which this callback cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it.
        """
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps a reference to the batch, not a copy."""
        self._batch = batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Releases the batch."""
        self._batch = None

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Adds the step to the history; the phase follows the first optimizer."""
        self._history.append(stats)
        if stats.optimizer == 0:
            rate = max(stats.nominal_learning_rates, default=0.0)
            self._phases.update(stats.step, stats.loss, stats.grad_norm, rate)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Sets the diagnosis context; if the fault recurs, the one with the best score stays."""
        incident.may_stop = self.stop
        if not trainer.optimizers:
            return
        best = [cause.points for cause in incident.likely_causes[:1]] if incident.context else []
        previous, incident.context = incident.context, self._context(trainer, pl_module, incident)
        score = [cause.points for cause in incident.likely_causes[:1]]
        if best > score:
            incident.context = previous

    def _context(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> DiagnosisContext:
        batch = incident.context.batch if incident.context else self._batch_problems(trainer)
        index = incident.anomaly.optimizer
        group = trainer.optimizers[index].param_groups[0]
        return DiagnosisContext(
            anomaly=incident.anomaly,
            history=tuple(s for s in self._history if s.optimizer == index),
            stats=incident.stats,
            batch=batch,
            precision=str(trainer.precision),
            phase=self._phases.phase if self._history else None,
            phase_range=self._phases.range_of(self._phases.phase),
            accumulation=trainer.accumulate_grad_batches,
            manual=not pl_module.automatic_optimization,
            momentum=group["betas"][0] if "betas" in group else group.get("momentum"),
            clips=bool(trainer.gradient_clip_val),
            rate_rose=self._phases.range_of("warm-up") is not None,
            restorable=_restorable(trainer),
        )

    def _batch_problems(self, trainer: Trainer) -> tuple[str, ...]:
        """Returns the problems found in the batches of all ranks."""
        try:
            found = [f for f in check_batch(self._batch) if f.severity == "error"]
        except NotApplicableError:
            found = []
        problems = gather_of(trainer)([f"{f.what} ({', '.join(f.where)})" for f in found])
        return tuple(dict.fromkeys(line for lines in problems for line in lines))

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the steps that were rolled back."""
        kept = [s for s in self._history if s.step < trainer.global_step]
        self._history.clear()
        self._history.extend(kept)

    def on_regime_change(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Clears the history: the earlier steps are no reference for the new regime."""
        self._history.clear()

    def rewindable_state(self) -> dict[str, Any]:
        """Returns the gradient norms by phase."""
        return self._phases.state_dict()

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Restores the gradient norms by phase."""
        self._phases.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns the gradient norms by phase; the history is not saved."""
        return {"phases": self._phases.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the gradient norms by phase; the history starts empty."""
        self._phases.load_state_dict(state_dict["phases"])


def _restorable(trainer: Trainer) -> bool | None:
    """Whether a callback has a good state to roll back to; None if no callback keeps one."""
    answers = [getattr(c, "can_roll_back", None) for c in callbacks_of(trainer)]
    known = [answer for answer in answers if answer is not None]
    return any(known) if known else None
