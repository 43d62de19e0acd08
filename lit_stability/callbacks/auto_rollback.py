"""`AutoRollback`: carries out the response that the ladder chooses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lit_stability.callbacks.dispatch import call_hook
from lit_stability.callbacks.gradient_monitor import require_monitor
from lit_stability.clipping import clip_coefficient, scale_gradients
from lit_stability.detectors import Window
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.ladder import Budget, HoldLearningRate, Ladder, RollBack, SkipStep, Stop
from lit_stability.lr_scale import learning_rate_scale
from lit_stability.snapshots import BufferGuard, Generations
from lit_stability.stats import StepStats
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

    Snapshots live in memory: two of weights, buffers and optimizer state, reported at fit start.

    Args:
        snapshot_every: healthy optimizer steps between snapshots.
        confirm_after: healthy steps after which a snapshot may be gone back to.
        relax_after: healthy steps after which a lowered learning rate and a tightened clip are
            doubled, until both are back; also after which a held learning rate is let go, once
            the scheduler has come back to what is bearable.
        budget: how many responses the run may spend.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        snapshot_every: int = 15,
        confirm_after: int = 10,
        relax_after: int = 20,
        budget: Budget | None = None,
    ) -> None:
        for name, value in (
            ("snapshot_every", snapshot_every),
            ("confirm_after", confirm_after),
            ("relax_after", relax_after),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        self.snapshot_every = snapshot_every
        self.confirm_after = confirm_after
        self.relax_after = relax_after
        self.ladder = Ladder(budget)
        self.lr_factor = 1.0
        """What the nominal learning rate is multiplied by."""
        self.clip_factor = 1.0
        """Clipping threshold over twice the median gradient norm; 1 means no clipping."""
        self._ceilings: dict[int, tuple[float, ...]] = {}
        self._norms: dict[int, Window] = {}
        self._ratios: dict[int, Window] = {}
        self._calm = 0
        self._bearable_for = 0
        self._since_snapshot = 0
        self._in_batch = _Batch()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it.
            RuntimeError: on several devices.
        """
        if stage != "fit":
            return
        require_monitor(trainer, self)
        if trainer.world_size > 1:
            raise RuntimeError(
                f"AutoRollback runs on one device, this trainer has {trainer.world_size}: a "
                "decision taken by one rank alone would leave the others waiting. Train on one "
                "device, or keep GradientMonitor and AnomalyCheckpoint, which only observe"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first snapshot and put restored factors in force."""
        self._guard = BufferGuard(pl_module)
        self._metrics = LoggedMetrics(pl_module)
        self._pause = SchedulerPause()
        self._snapshots: Generations[TrainingSnapshot] = Generations(
            lambda: TrainingSnapshot(pl_module), self.confirm_after
        )
        self._norms = {i: Window(100) for i in range(len(trainer.optimizers))}
        self._ratios = {i: Window(100) for i in range(len(trainer.optimizers))}
        self._in_batch = _Batch()
        self._calm = self._bearable_for = self._since_snapshot = 0
        self._apply(trainer)
        self._snapshots.begin().capture(trainer, pl_module)
        self._snapshots.confirm_now()
        confirmed = self._snapshots.confirmed
        if confirmed is not None:
            log.info(
                "AutoRollback holds two snapshots, %.1f MiB each now", confirmed.nbytes / 2**20
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what a bad batch would spoil before its veto."""
        if self._in_batch.window_is_new:
            self._guard.capture()
            self._metrics.capture(trainer)
            self._in_batch.window_is_new = False

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Count the step, clip where the clip is tightened, relax what was tightened."""
        self._in_batch.steps += 1
        self._since_snapshot += 1
        self.ladder.healthy()
        self._snapshots.healthy()
        norms = self._norms[stats.optimizer]
        if self.clip_factor < 1 and stats.finite_gradients and len(norms):
            threshold = 2 * norms.median * self.clip_factor
            if threshold > 0:
                parameters = _parameters(trainer.optimizers[stats.optimizer])
                scale_gradients(parameters, clip_coefficient(stats.grad_norm, threshold))
        norms.add(stats.grad_norm)
        if stats.update_ratio is not None:
            self._ratios[stats.optimizer].add(stats.update_ratio)
        self._relax(trainer, stats)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Choose the response, and do the part of it that must come before the update."""
        if incident.settled:
            return
        self._calm = 0
        anomaly = incident.anomaly
        optimizer = trainer.optimizers[anomaly.optimizer]
        damaged = anomaly.state_is_bad or self._damaged(incident)
        response = self.ladder.respond(
            anomaly, state_is_bad=damaged, excess=self._excess(incident.stats)
        )
        incident.settle(response)
        if isinstance(response, HoldLearningRate):
            self._ceilings[anomaly.optimizer] = response.ceilings
            self._apply(trainer)
            self._in_batch.steps += 1
            return
        self._in_batch.vetoed += 1
        self._in_batch.incident = incident
        veto(optimizer)
        self._pause.begin(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do the part of the response that comes after the step, or take a snapshot.

        Raises:
            TrainingStopped: when the ladder has nothing left.
        """
        done = self._in_batch
        if done.vetoed:
            self._in_batch = _Batch()
            self._pause.end(trainer)
            self._undo(trainer, done.vetoed)
            self._respond(trainer, pl_module, done.incident)
        elif done.steps:
            self._in_batch = _Batch()
            monitor_is_calm = self._calm > 0
            if self._since_snapshot >= self.snapshot_every and monitor_is_calm:
                self._snapshots.begin().capture(trainer, pl_module)
                self._since_snapshot = 0

    def _undo(self, trainer: Trainer, vetoed: int) -> None:
        for _ in range(vetoed):
            uncount_step(trainer)
        self._guard.restore()
        self._metrics.restore(trainer)

    def _respond(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident | None
    ) -> None:
        response = None if incident is None else incident.response
        if incident is None or response is None or isinstance(response, SkipStep):
            return
        self._snapshots.discard()
        self._since_snapshot = 0
        confirmed = self._snapshots.confirmed
        if confirmed is not None:
            confirmed.restore(trainer)
            call_hook("on_rollback", trainer, pl_module)
        if isinstance(response, RollBack):
            self.lr_factor *= response.lr_factor
            self.clip_factor *= response.clip_factor
            self._apply(trainer)
        if isinstance(response, Stop):
            raise TrainingStopped(
                f"training stopped at step {trainer.global_step}: {response.reason}. "
                f"What to try: {incident.remedy}. Record: {incident.record}"
                + (f", scene: {incident.path}" if incident.path else ""),
                incident,
            )

    def _damaged(self, incident: Incident) -> bool:
        """Whether a weight moved further since the snapshot than training can have moved it."""
        confirmed = self._snapshots.confirmed
        outlier = None if confirmed is None else confirmed.module.outlier()
        if confirmed is None or outlier is None:
            return False
        name, moved = outlier
        incident.note(
            "a weight was damaged from outside",
            f"an element of {name} moved by {moved:.3g} since step {confirmed.step}, "
            "a thousand times more than any other parameter",
        )
        return True

    def _excess(self, stats: StepStats | None) -> float:
        """The update-to-weight ratio of the last update over its median."""
        if stats is None or not stats.update_ratio or len(self._ratios[stats.optimizer]) < 10:
            return 1.0
        return stats.update_ratio / max(self._ratios[stats.optimizer].median, 1e-30)

    def _relax(self, trainer: Trainer, stats: StepStats) -> None:
        self._calm += 1
        ceilings = self._ceilings.get(stats.optimizer)
        if ceilings is not None:
            bearable = all(
                n * self.lr_factor <= c
                for n, c in zip(stats.nominal_learning_rates, ceilings, strict=True)
            )
            self._bearable_for = self._bearable_for + 1 if bearable else 0
            if self._bearable_for >= self.relax_after:
                del self._ceilings[stats.optimizer]
                self._apply(trainer)
                log.info("step %d: the learning rate is no longer held", stats.step)
        tightened = self.lr_factor < 1 or self.clip_factor < 1
        if tightened and self._calm % self.relax_after == 0:
            self.lr_factor = min(1.0, 2 * self.lr_factor)
            self.clip_factor = min(1.0, 2 * self.clip_factor)
            self._apply(trainer)
            if self.lr_factor == 1 and self.clip_factor == 1:
                log.info("step %d: learning rate and clip are back to normal", stats.step)

    def _apply(self, trainer: Trainer) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            learning_rate_scale(optimizer).set(self.lr_factor, self._ceilings.get(index))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave optimizers and memory as they were found."""
        if stage == "fit":
            for optimizer in trainer.optimizers:
                learning_rate_scale(optimizer).detach()

    def state_dict(self) -> dict[str, Any]:
        """What was spent and what is in force; the options come from the constructor."""
        return {
            "ladder": self.ladder.state_dict(),
            "lr_factor": self.lr_factor,
            "clip_factor": self.clip_factor,
            "ceilings": {str(i): list(c) for i, c in self._ceilings.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put such a state back; it is in force from the start of training."""
        self.ladder.load_state_dict(state_dict["ladder"])
        self.lr_factor = float(state_dict["lr_factor"])
        self.clip_factor = float(state_dict["clip_factor"])
        self._ceilings = {int(i): tuple(c) for i, c in state_dict["ceilings"].items()}


class _Batch:
    """What happened between two batch ends."""

    def __init__(self) -> None:
        self.window_is_new = True
        self.steps = 0
        self.vetoed = 0
        self.incident: Incident | None = None


def veto(optimizer: Optimizer) -> None:
    """Keep an optimizer from moving anything at the step it is about to take.

    Without gradients no optimizer touches weights, moments, decay or step counts; with gradients
    of zero they do.
    """
    for parameter in _parameters(optimizer):
        parameter.grad = None


def _parameters(optimizer: Optimizer) -> Sequence[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
