"""A whole healthy state of training: everything that a rollback rewinds."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.snapshots import ModuleSnapshot, OptimizerSnapshot, capture_rng, restore_rng
from lit_stability.trainer_state.metrics import LoggedMetrics
from lit_stability.trainer_state.progress import Progress, capture_progress, restore_progress
from lit_stability.trainer_state.view import callbacks_of


class TrainingSnapshot:
    """Weights, buffers, optimizers, schedulers, scaler, RNG, counters, metrics, callbacks' state.

    A callback takes part by defining ``rewindable_state()`` and ``load_rewindable_state(state)``.
    To be captured and restored at the end of a batch, outside the optimizer's step.

    Args:
        pl_module: the module in training.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self.module = ModuleSnapshot()
        self.step = 0
        self._optimizers: list[OptimizerSnapshot] = []
        self._metrics = LoggedMetrics(pl_module)
        self._schedulers: list[Any] = []
        self._scaler: Any = None
        self._rng: dict[str, Any] = {}
        self._progress = Progress(0, 0, 0)
        self._callbacks: list[tuple[Any, Any]] = []

    def capture(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the state in."""
        self.step = trainer.global_step
        self.module.capture(pl_module)
        if len(self._optimizers) != len(trainer.optimizers):
            self._optimizers = [OptimizerSnapshot() for _ in trainer.optimizers]
        for saved, optimizer in zip(self._optimizers, trainer.optimizers, strict=True):
            saved.capture(optimizer)
        self._metrics.capture(trainer)
        self._schedulers = [
            copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
        ]
        self._scaler = copy.deepcopy(trainer.precision_plugin.state_dict())
        self._rng = capture_rng()
        self._progress = capture_progress(trainer)
        self._callbacks = [
            (callback, callback.rewindable_state())
            for callback in callbacks_of(trainer)
            if hasattr(callback, "rewindable_state")
        ]

    def restore(self, trainer: Trainer) -> None:
        """Copy the state back. Gradients are cleared; the data goes on where it is."""
        self.module.restore()
        for saved, optimizer in zip(self._optimizers, trainer.optimizers, strict=True):
            saved.restore(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self._metrics.restore(trainer)
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        if self._scaler:
            trainer.precision_plugin.load_state_dict(copy.deepcopy(self._scaler))
        restore_rng(self._rng)
        restore_progress(trainer, self._progress)
        for callback, state in self._callbacks:
            callback.load_rewindable_state(state)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return self.module.bank.nbytes + sum(o.bank.nbytes for o in self._optimizers)
