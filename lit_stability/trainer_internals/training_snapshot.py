"""States that training can be restored to: a complete snapshot, and the start of a step."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.trainer_internals.callback_state import Restore, Stateful, capture_callback_state
from lit_stability.trainer_internals.loop_counters import LoopState, Steps
from lit_stability.trainer_internals.metrics import LoggedMetrics
from lit_stability.training_state.frozen_weights import FrozenWeights
from lit_stability.training_state.rng import capture_rng, restore_rng
from lit_stability.training_state.snapshot import BufferGuard, ModuleSnapshot, OptimizerSnapshot


class TrainingSnapshot:
    """A snapshot of module, optimizers, schedulers, scaler, RNG, metrics, loops and callbacks.

    The state of a callback or module is included if it defines ``rewindable_state()`` and
    ``load_rewindable_state(state)``. Capture a snapshot between two batches, and restore it at the
    end of one.

    Args:
        pl_module: the module in training.
        frozen: frozen weights, which all snapshots of the module share.
    """

    def __init__(self, pl_module: LightningModule, frozen: FrozenWeights) -> None:
        self.module = ModuleSnapshot(frozen)
        self.step = 0
        self.position = 0
        """Position of the next batch in the replay ring."""
        self.mark = 0
        """Mark in the ledger of checkpoint files."""
        self.loops: LoopState
        self.steps = Steps(0, 0, 0)
        self._optimizers: list[OptimizerSnapshot] = []
        self._metrics = LoggedMetrics(pl_module)
        self._schedulers: list[Any] = []
        self._scaler: Any = None
        self._rng: dict[str, Any] = {}
        self._callback_state: list[Restore] = []
        self._averages: dict[int, ModuleSnapshot] = {}

    def capture(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        position: int,
        mark: int,
        registered: Iterable[Stateful] = (),
    ) -> None:
        """Copies the current state into the snapshot."""
        self.step, self.position, self.mark = trainer.global_step, position, mark
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
        self._callback_state = capture_callback_state(
            trainer, pl_module, registered, self._averages
        )
        self.loops, self.steps = LoopState(trainer), Steps.of(trainer)
        self._rng = capture_rng()

    def restore(self, trainer: Trainer, *, replay: bool) -> None:
        """Restores all state except loops and data, and clears the gradients.

        Args:
            trainer: to restore.
            replay: whether the steps since then are replayed; parameter groups added since then
                are removed, as the replay adds them again.
        """
        self.module.restore()
        for saved, optimizer in zip(self._optimizers, trainer.optimizers, strict=True):
            saved.restore(optimizer, drop_new_groups=replay)
        clear_gradients(trainer)
        self._metrics.restore(trainer)
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        if self._scaler:
            trainer.precision_plugin.load_state_dict(copy.deepcopy(self._scaler))
        self.restore_callback_state()
        restore_rng(self._rng)

    def restore_callback_state(self) -> None:
        """Restores the state of callbacks, module and registered objects."""
        for restore in self._callback_state:
            restore()

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes, without the shared frozen weights."""
        banks = [self.module.bank, *(average.bank for average in self._averages.values())]
        return sum(bank.nbytes for bank in (*banks, *(o.bank for o in self._optimizers)))


class StepStart:
    """State that a step changes before it can be skipped: buffers, metrics, RNG, loop counters.

    Args:
        pl_module: the module in training.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._buffers = BufferGuard(pl_module)
        self._metrics = LoggedMetrics(pl_module)
        self.position = 0
        self.loops: LoopState
        self._rng: dict[str, Any] = {}

    def capture(self, trainer: Trainer, *, position: int) -> None:
        """Captures the state, before the first batch of the step is fetched."""
        self.position = position
        self._buffers.capture()
        self._metrics.capture(trainer)
        self.loops = LoopState(trainer)
        self._rng = capture_rng()

    def non_finite_buffers(self) -> set[tuple[int, str]]:
        """Returns id of the module and key of each buffer that was non-finite at the start."""
        return self._buffers.non_finite_buffers()

    def restore(self, trainer: Trainer) -> None:
        """Restores all state except loops and data, and clears the gradients."""
        self._buffers.restore()
        self._metrics.restore(trainer)
        clear_gradients(trainer)
        restore_rng(self._rng)


def clear_gradients(trainer: Trainer) -> None:
    """Sets the gradients of an undone step to 0, as hooks of its batch may still read them.

    Before the next backward pass they must be None again, because an optimizer updates a parameter
    that has a gradient of 0. In automatic optimization Lightning sees to that.
    """
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=False)
