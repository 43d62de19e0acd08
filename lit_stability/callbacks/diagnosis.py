"""`Diagnosis`: names the causes of an incident, so that the right thing is done about it."""

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
    """Weighs the causes of each incident: what speaks for them, what to try, when to do nothing.

    The causes are rows of `lit_stability.diagnosis.CAUSES`; `register_cause` adds yours. They are
    weighed by the pattern of the loss, the gradients against those of the steps before, the layers
    that show it most, the phase of the run, the batch, the operation that a `NonFiniteLocator`
    found, what came of taking the step again, and what probes have measured. The best supported is
    in the line on the console and in ``incident.cause``; all are in the record and the report.

    A cause also decides what is done. A learning rate that is likely too high is lowered at the
    first rollback, without trying the same once more. Where the architecture is certain to be the
    cause (attention that has collapsed, a gain of zero), no step that follows can help: the fit
    stops with the diagnosis.

    To be put before the callbacks that respond. Healthy steps cost some microseconds.

    Args:
        history: accepted steps that are kept to compare with.
        stop: whether a certain architectural cause ends the fit; it is told of in any case.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it.
        """
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, not a copy of it."""
        self._batch = batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of the batch."""
        self._batch = None

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Remember the step; of several optimizers, the first tells the phase."""
        self._history.append(stats)
        if stats.optimizer == 0:
            rate = max(stats.nominal_learning_rates, default=0.0)
            self._phases.update(stats.step, stats.loss, stats.grad_norm, rate)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Say what is known; of several strikes, that counts which says most."""
        incident.may_stop = self.stop
        known = [each.points for each in incident.likely_causes[:1]] if incident.context else []
        before, incident.context = incident.context, self._context(trainer, pl_module, incident)
        said = [each.points for each in incident.likely_causes[:1]]
        if known > said:
            incident.context = before

    def _context(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> DiagnosisContext:
        batch = incident.context.batch if incident.context else self._look_at_batch(trainer)
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

    def _look_at_batch(self, trainer: Trainer) -> tuple[str, ...]:
        """What is wrong with the batches of all ranks."""
        try:
            found = [f for f in check_batch(self._batch) if f.severity == "error"]
        except NotApplicableError:
            found = []
        said = gather_of(trainer)([f"{f.what} ({', '.join(f.where)})" for f in found])
        return tuple(dict.fromkeys(line for lines in said for line in lines))

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the steps that were taken back."""
        kept = [s for s in self._history if s.step < trainer.global_step]
        self._history.clear()
        self._history.extend(kept)

    def on_regime_change(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Forget the steps before: they are no measure of those to come."""
        self._history.clear()

    def rewindable_state(self) -> dict[str, Any]:
        """The gradient norms of the phases."""
        return self._phases.state_dict()

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._phases.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """The gradient norms of the phases; the history begins anew."""
        return {"phases": self._phases.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back."""
        self._phases.load_state_dict(state_dict["phases"])


def _restorable(trainer: Trainer) -> bool | None:
    """Whether a callback has a good state to go back to; None where none keeps one."""
    said = [getattr(c, "can_roll_back", None) for c in callbacks_of(trainer)]
    known = [each for each in said if each is not None]
    return any(known) if known else None
