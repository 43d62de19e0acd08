"""`AutoRollback`: carries out the response that the ladder chooses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lit_stability.callbacks.dispatch import call_hook
from lit_stability.callbacks.requirements import (
    require_monitor,
    require_tried_strategy,
    require_whole_optimizers,
)
from lit_stability.clipping import clip_coefficient, scale_gradients
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.ladder import Budget, HoldLearningRate, Ladder, RollBack, SkipStep, Stop
from lit_stability.lr_scale import learning_rate_scale
from lit_stability.snapshots import BufferGuard, Generations
from lit_stability.stats import StepStats
from lit_stability.throttle import Baseline, Throttle
from lit_stability.trainer_state import (
    LoggedMetrics,
    SchedulerPause,
    TrainingSnapshot,
    uncount_step,
)

log = logging.getLogger("lightning.pytorch.lit_stability")


class AutoRollback(Callback):
    """Skips bad steps, holds a jumping learning rate, rolls back damage, and knows its limits.

    A bad batch costs its step and nothing else: weights, moments, schedulers, buffers, epoch
    metrics and ``global_step`` are as if it had not come. Damaged state is put back to the newest
    snapshot that ``confirm_after`` healthy steps have confirmed; the data goes on where it is
    and ``global_step`` is rewound, so that ``max_steps`` good steps are taken. When the ladder has
    nothing left, the fit ends with `TrainingStopped`, the weights at the last confirmed snapshot.

    Snapshots live in memory: two of weights, buffers and optimizer state; their size is reported
    when the fit starts.

    Args:
        snapshot_every: healthy optimizer steps between snapshots, if the last one is confirmed.
        confirm_after: healthy steps after which a snapshot may be gone back to.
        relax_after: calm steps after which a lowered learning rate and a tightened clip are
            doubled, until both are back. A learning rate that is held against a jump of its
            schedule is let go when the schedule comes back.
        budget: how many responses the run may spend.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        snapshot_every: int = 20,
        confirm_after: int = 10,
        relax_after: int = 20,
        budget: Budget | None = None,
    ) -> None:
        for name, value in (("snapshot_every", snapshot_every), ("confirm_after", confirm_after)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        self.snapshot_every = snapshot_every
        self.confirm_after = confirm_after
        self.throttle = Throttle(relax_after)
        self.ladder = Ladder(budget)
        self._fit: _Fit | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it.
            RuntimeError: under a strategy that was not tried.
        """
        if stage == "fit":
            require_monitor(trainer, self)
            require_tried_strategy(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first snapshot and put restored factors in force."""
        require_whole_optimizers(trainer, self)
        self._fit = fit = _Fit(trainer, pl_module, self.confirm_after)
        groups = {i: len(o.param_groups) for i, o in enumerate(trainer.optimizers)}
        for index, factors in [*self.throttle.holds.items()]:
            if groups.get(index) != len(factors):
                del self.throttle.holds[index]
                log.info("the learning rates held before belong to other groups: let go")
        self._apply(trainer)
        first = fit.snapshots.begin()
        first.capture(trainer, pl_module)
        fit.snapshots.confirm_now()
        log.info("AutoRollback holds two snapshots, %.1f MiB each now", first.nbytes / 2**20)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what a bad batch would spoil before its veto."""
        if self._now.window_is_new:
            self._now.guard.capture()
            self._now.metrics.capture(trainer)
            self._now.window_is_new = False

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Count the step, clip where the clip is tightened, relax what was tightened."""
        now = self._now
        now.stepped = True
        now.since_snapshot += 1
        now.healthy += 1
        self.ladder.healthy()
        baseline = now.baselines[stats.optimizer]
        threshold = baseline.clip_threshold(self.throttle.clip_factor)
        if threshold is not None and stats.finite_gradients:
            parameters = _parameters(trainer.optimizers[stats.optimizer])
            scale_gradients(parameters, clip_coefficient(stats.grad_norm, threshold))
        baseline.add(stats.grad_norm, stats.update_ratio)
        relaxed = self.throttle.calm(stats.optimizer, stats.nominal_learning_rates)
        if relaxed is not None:
            self._apply(trainer)
            log.info("step %d: %s", stats.step, relaxed)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Choose the response, and do the part of it that must come before the update."""
        if incident.settled or incident.anomaly.observe_only:
            return
        now, anomaly = self._now, incident.anomaly
        self.throttle.disturbed()
        ratio = None if incident.stats is None else incident.stats.update_ratio
        response = self.ladder.respond(
            anomaly,
            state_is_bad=incident.agree(self._damaged(incident)),
            excess=now.baselines[anomaly.optimizer].excess(ratio),
        )
        incident.settle(response)
        if isinstance(response, HoldLearningRate):
            self.throttle.hold(anomaly.optimizer, response.factors)
            self._apply(trainer)
            now.stepped = True
            return
        now.vetoed += 1
        if not isinstance(response, SkipStep):
            now.due = (response, incident)
        if anomaly.kind == "non-finite loss" and now.scaler_state is None:
            # The loss scaler is about to back off for a batch that is none of its business.
            now.scaler_state = copy.deepcopy(trainer.precision_plugin.state_dict())
        veto(trainer.optimizers[anomaly.optimizer])
        now.pause.begin(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do the part of the response that comes after the step, or take a snapshot.

        Raises:
            TrainingStopped: when the ladder has nothing left.
        """
        now = self._now
        if now.vetoed:
            self._undo(trainer)
        if now.due is not None:
            self._go_back(trainer, pl_module, *now.due)
        elif now.stepped:
            self._keep(trainer, pl_module)
        if now.vetoed or now.stepped:
            now.begin_window()

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count healthy steps towards a snapshot, and take one where it is due.

        Not before the end of the batch: until then another rank may turn out not to have stepped.
        """
        now = self._now
        for _ in range(now.healthy):
            now.snapshots.healthy()
        if now.since_snapshot >= self.snapshot_every and now.snapshots.ready:
            now.snapshots.begin().capture(trainer, pl_module)
            now.since_snapshot = 0

    @property
    def _now(self) -> _Fit:
        assert self._fit is not None, "between on_train_start and teardown only"
        return self._fit

    def _undo(self, trainer: Trainer) -> None:
        """Leave no trace of the steps vetoed in this batch."""
        now = self._now
        now.pause.end(trainer)
        for _ in range(now.vetoed):
            uncount_step(trainer)
        now.guard.restore()
        now.metrics.restore(trainer)
        if now.scaler_state:
            trainer.precision_plugin.load_state_dict(now.scaler_state)

    def _go_back(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        response: RollBack | Stop,
        incident: Incident,
    ) -> None:
        now = self._now
        now.snapshots.discard()
        now.since_snapshot = 0
        if now.snapshots.confirmed is not None:
            now.snapshots.confirmed.restore(trainer)
        call_hook("on_rollback", trainer, pl_module)
        if isinstance(response, Stop):
            scene = f", scene: {incident.path}" if incident.path else ""
            raise TrainingStopped(
                f"training stopped at step {trainer.global_step}: {response.reason}. "
                f"What to try: {incident.remedy}. Record: {incident.record}{scene}",
                incident,
            )
        self.throttle.cut(response.lr_factor, response.clip_factor)
        self._apply(trainer)

    def _damaged(self, incident: Incident) -> bool:
        """Whether a weight moved further since the snapshot than training can have moved it."""
        confirmed = self._now.snapshots.confirmed
        outlier = None if confirmed is None else confirmed.module.outlier()
        if confirmed is None or outlier is None:
            return False
        name, moved = outlier
        incident.note(
            "a weight was damaged from outside",
            f"an element of {name} moved by {moved:.3g} since step {confirmed.step}, "
            "a thousand times more than any of another parameter",
        )
        return True

    def _apply(self, trainer: Trainer) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            factors = self.throttle.factors(index, len(optimizer.param_groups))
            learning_rate_scale(optimizer).set(factors)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no scaled learning rate behind in an optimizer that somebody may save now."""
        for optimizer in trainer.optimizers:
            learning_rate_scale(optimizer).recover()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave optimizers and memory as they were found."""
        if stage == "fit":
            for optimizer in trainer.optimizers:
                learning_rate_scale(optimizer).detach()
            self._fit = None

    def books(self) -> dict[str, Any]:
        """What was spent, what is in force and what is healthy, for ranks that disagree."""
        baselines = [baseline.state_dict() for baseline in self._now.baselines]
        return {**self.state_dict(), "baselines": baselines}

    def load_books(self, books: dict[str, Any]) -> None:
        """Go on from the books of another rank; what this one alone vetoed is rolled back."""
        self.load_state_dict(books)
        for baseline, saved in zip(self._now.baselines, books["baselines"], strict=True):
            baseline.load_state_dict(saved)
        self._now.vetoed = 0
        self._now.due = None

    def state_dict(self) -> dict[str, Any]:
        """What was spent and what is in force; the options come from the constructor."""
        return {"ladder": self.ladder.state_dict(), "throttle": self.throttle.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put such a state back; it is in force from the start of training."""
        self.ladder.load_state_dict(state_dict["ladder"])
        self.throttle.load_state_dict(state_dict["throttle"])


class _Fit:
    """What lives as long as one fit."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, confirm_after: int) -> None:
        self.guard = BufferGuard(pl_module)
        self.metrics = LoggedMetrics(pl_module)
        self.pause = SchedulerPause()
        self.snapshots = Generations(lambda: TrainingSnapshot(pl_module), confirm_after)
        self.baselines = [Baseline() for _ in trainer.optimizers]
        self.since_snapshot = 0
        self.begin_window()

    def begin_window(self) -> None:
        """Forget what happened since the last optimizer step."""
        self.window_is_new = True
        self.stepped = False
        self.healthy = 0
        self.vetoed = 0
        self.due: tuple[RollBack | Stop, Incident] | None = None
        self.scaler_state: dict[str, Any] | None = None


def veto(optimizer: Optimizer) -> None:
    """Keep an optimizer from moving anything at the step it is about to take.

    Without gradients no optimizer touches weights, moments, decay or step counts; with gradients
    of zero they do.
    """
    for parameter in _parameters(optimizer):
        parameter.grad = None


def _parameters(optimizer: Optimizer) -> Sequence[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
