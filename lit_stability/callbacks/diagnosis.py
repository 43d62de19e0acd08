"""`Diagnosis`: finds the likely causes of an incident, on which the response depends."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import gather_of, require_monitor
from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.inputs import check_batch
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.diagnosis import DiagnosisContext
from lit_stability.diagnosis.training_phases import PhaseRanges
from lit_stability.distributed.dtensor import local
from lit_stability.incidents import Incident
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.batch_statistics import unusual
from lit_stability.measurement.number_formats import which_are_finite
from lit_stability.measurement.step_stats import StepStats
from lit_stability.renamed import renamed
from lit_stability.trainer_internals import callbacks_of

log = suite_logger()


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

    >>> from lit_stability import stability_callbacks
    >>> suite = stability_callbacks(diagnosis=dict(stop_on_certain_cause=False))

    Args:
        history: number of accepted steps kept for comparison.
        stop_on_certain_cause: whether a certain architectural cause ends the fit; it is reported in
            any case.

    Raises:
        ValueError: if ``history`` is less than 20.
    """

    ignores_skipped_steps = True

    @renamed(stop="stop_on_certain_cause")
    def __init__(self, *, history: int = 100, stop_on_certain_cause: bool = True) -> None:
        if history < 20:
            raise ValueError(f"history must be at least 20 steps, got {history!r}")
        self.stop_on_certain_cause = stop_on_certain_cause
        self._history: deque[StepStats] = deque(maxlen=history)
        self._phases = PhaseRanges()
        self._batch: Any = None
        self._first_batch: frozenset[str] | None = None
        """Tensors of the first batch of the fit that are not normalised; None before it."""
        self._bad_from_start: frozenset[str] = frozenset()
        self._first_norm = 0.0
        """Norm of the trainable weights of this rank when the fit began."""
        self._sensitivity: float | None = None

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
        """Keeps a reference to the batch, not a copy; looks at the scale of the first one."""
        self._batch = batch
        if self._first_batch is None:
            found = _findings(batch) or []
            self._first_batch = frozenset(f.where[0] for f in found if f.severity == "warning")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the weights, and looks for buffers that are non-finite already."""
        self._first_batch = self._sensitivity = None
        trained = [local(p.detach()) for p in pl_module.parameters() if p.requires_grad]
        self._first_norm = float(torch.nn.utils.get_total_norm(trained))
        buffers = dict(pl_module.named_buffers())
        finite = which_are_finite(buffers.values())
        self._bad_from_start = frozenset(
            name for name, ok in zip(buffers, finite, strict=True) if not ok
        )

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
        if stats.step == 0 and stats.has_loss and stats.loss > 0:
            self._sensitivity = stats.grad_norm * self._first_norm / stats.loss
        if stats.optimizer == 0:
            rate = max(stats.nominal_learning_rates, default=0.0)
            self._phases.update(stats.step, stats.loss, stats.grad_norm, rate)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Sets the diagnosis context; if the fault recurs, the one with the best score stays."""
        incident.may_stop = self.stop_on_certain_cause
        if not trainer.optimizers:
            return
        best = [cause.points for cause in incident.likely_causes[:1]] if incident.context else []
        named = incident.cause if incident.context else ""
        previous, incident.context = incident.context, self._context(trainer, pl_module, incident)
        score = [cause.points for cause in incident.likely_causes[:1]]
        cleared = named in [each.cause for each in incident.ruled_out]
        if best > score and not cleared:
            incident.context = previous

    def _context(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> DiagnosisContext:
        index = incident.anomaly.optimizer
        group = trainer.optimizers[index].param_groups[0]
        about_batch = incident.context or self._look_at_batch(trainer, incident)
        return replace(
            about_batch,
            anomaly=incident.anomaly,
            history=tuple(s for s in self._history if s.optimizer == index),
            stats=incident.stats,
            bad_from_start=self._bad_from_start,
            layer_types=frozenset(type(m).__name__.lower() for m in pl_module.modules()),
            optimizer_type=type(trainer.optimizers[index]).__name__.lower(),
            batches_per_epoch=trainer.num_training_batches,
            sensitivity_at_start=self._sensitivity,
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

    def _look_at_batch(self, trainer: Trainer, incident: Incident) -> DiagnosisContext:
        """Returns a context of what the batches of all ranks show: new problems, and old ones."""
        first, found = self._first_batch or frozenset(), _findings(self._batch)
        new: list[str] = []
        usual: list[str] = []
        for each in found or []:
            of_all = each.severity == "warning" and each.where[0] in first
            (usual if of_all else new).append(f"{each.what} ({', '.join(each.where)})")
        differs = _differences(trainer)
        answers = gather_of(trainer)((found is not None, new, usual, differs))
        return DiagnosisContext(
            anomaly=incident.anomaly,
            batch=tuple(dict.fromkeys(line for answer in answers for line in answer[1])),
            unscaled=tuple(dict.fromkeys(line for answer in answers for line in answer[2])),
            unusual=tuple(dict.fromkeys(line for answer in answers for line in answer[3])),
            # Of several batches of a step only the last is here: the others may be bad.
            batch_examined=trainer.accumulate_grad_batches == 1
            and all(answer[0] for answer in answers),
        )

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


def _findings(batch: Any) -> list[Finding] | None:
    """Returns what is wrong with a batch; None if it cannot be examined."""
    try:
        return check_batch(batch)
    except NotApplicableError:
        return None
    except Exception as error:  # a batch may hold anything, and no check may end the run
        log.debug("the batch cannot be examined: %r", error)
        return None


def _differences(trainer: Trainer) -> list[str]:
    """Returns in what the present batch differs from those that `AutoRollback` keeps."""
    found = (getattr(each, "recent_batches", None) for each in callbacks_of(trainer))
    keeps = next((each for each in found if each is not None), None)
    batches, first = ([], 0) if keeps is None else keeps()
    if not batches:
        return []
    try:
        return unusual(batches[-1], batches[:-1], first)
    except Exception as error:  # as above
        log.debug("the batch cannot be compared with others: %r", error)
        return []


def _restorable(trainer: Trainer) -> bool | None:
    """Whether a callback has a good state to roll back to; None if no callback keeps one."""
    answers = [getattr(c, "can_roll_back", None) for c in callbacks_of(trainer)]
    known = [answer for answer in answers if answer is not None]
    return any(known) if known else None
