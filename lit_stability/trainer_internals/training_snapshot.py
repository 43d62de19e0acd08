"""States that training can be restored to: a complete snapshot, and the start of a step."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals.callback_state import (
    Restore,
    Stateful,
    capture_callback_state,
    keeps_state,
)
from lit_stability.trainer_internals.loop_counters import LoopState, Steps
from lit_stability.trainer_internals.metrics import LoggedMetrics
from lit_stability.trainer_internals.plain_attributes import (
    PlainAttributes,
    is_of_the_user,
    owners_in,
)
from lit_stability.trainer_internals.schedulers import SchedulerState
from lit_stability.trainer_internals.strategies import adapter_of
from lit_stability.trainer_internals.trainer_view import callbacks_of
from lit_stability.training_state.copies import Copies
from lit_stability.training_state.frozen_weights import FrozenWeights
from lit_stability.training_state.rng import capture_rng, restore_rng
from lit_stability.training_state.snapshot import (
    BufferGuard,
    ModuleSnapshot,
    OptimizerSnapshot,
    TensorBank,
)
from lit_stability.training_state.tensor_parts import memory_of


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
        self._beside = TensorBank()
        """Of weights that are in neither, as the strategy keeps them."""
        self._counts: Any = None
        self._copies = Copies()
        self._metrics = LoggedMetrics(pl_module)
        self._schedulers: list[SchedulerState] = []
        self._scaler: Any = None
        self._rng: dict[str, Any] = {}
        self._callback_state: list[Restore] = []
        self._averages: dict[int, ModuleSnapshot] = {}
        self._attributes = PlainAttributes(())
        self._of_callbacks = PlainAttributes(())
        self._trained: list[tuple[Tensor, bool]] = []

    def capture(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        position: int,
        mark: int,
        registered: Iterable[Stateful] = (),
        written: Collection[Tensor] = (),
    ) -> None:
        """Copies the current state into the snapshot.

        Args:
            trainer: between two batches.
            pl_module: the module in training.
            position: of the next batch in the replay ring.
            mark: in the ledger of checkpoint files.
            registered: objects whose state belongs to it.
            written: parameters that the program writes outside of an optimizer's step.
        """
        self.step, self.position, self.mark = trainer.global_step, position, mark
        # A validation leaves weights gathered, which belong to no snapshot.
        adapter_of(trainer).reshard(pl_module)
        adapter = adapter_of(trainer)
        self.module.capture(pl_module, written, leave=adapter.parameters_to_leave())
        self._beside.capture(adapter.tensors_to_copy())
        self._counts = adapter.counts()
        optimizers = adapter.optimizers_to_copy()
        if len(self._optimizers) != len(optimizers):
            self._optimizers = [OptimizerSnapshot(self._copies) for _ in optimizers]
        for saved, optimizer in zip(self._optimizers, optimizers, strict=True):
            saved.capture(optimizer)
        self._metrics.capture(trainer)
        self._schedulers = [
            SchedulerState(config.scheduler) for config in trainer.lr_scheduler_configs
        ]
        self._scaler = copy.deepcopy(trainer.precision_plugin.state_dict())
        self._callback_state = capture_callback_state(
            trainer, pl_module, registered, self._averages
        )
        self._attributes = PlainAttributes(owners_in(trainer, pl_module, of_torch=True))
        self._of_callbacks = PlainAttributes(filter(is_of_the_user, callbacks_of(trainer)))
        for attributes in (self._attributes, self._of_callbacks):
            attributes.capture()
        self._trained = [(p, p.requires_grad) for p in pl_module.parameters()]
        self.loops, self.steps = LoopState(trainer), Steps.of(trainer)
        self._rng = capture_rng()

    def place(self, copies: Copies) -> None:
        """Has the next capture copy weights and moments in another way, or to another memory."""
        self._copies = copies
        for bank in self._banks:
            bank.place(copies)

    @property
    def _banks(self) -> tuple[TensorBank, ...]:
        return self.module.bank, self._beside, *(saved.bank for saved in self._optimizers)

    @property
    def written(self) -> bool:
        """Whether weights or moments were written since the capture began."""
        return any(bank.written for bank in self._banks)

    def restore(self, trainer: Trainer, *, replay: bool) -> None:
        """Restores all state except loops and data, and clears the gradients.

        Args:
            trainer: to restore.
            replay: whether the steps since then are replayed; parameter groups added since then
                are removed, as the replay adds them again, and what was frozen then is frozen.
        """
        if replay and self.crosses_change_of_groups(trainer):
            # A flag of the callback that made the change must not say that it was made.
            self._of_callbacks.restore()
            for parameter, trained in self._trained:
                parameter.requires_grad_(trained)
        adapter = adapter_of(trainer)
        adapter.reshard(trainer.lightning_module)
        self.module.restore()
        self._beside.restore()
        for saved, optimizer in zip(self._optimizers, adapter.optimizers_to_copy(), strict=True):
            saved.restore(optimizer, drop_new_groups=replay)
        adapter.load_counts(self._counts)
        adapter.weights_restored()
        clear_gradients(trainer)
        self._metrics.restore(trainer)
        for state in self._schedulers:
            state.restore()
        if self._scaler:
            trainer.precision_plugin.load_state_dict(copy.deepcopy(self._scaler))
        self._attributes.restore()
        self.restore_callback_state()
        restore_rng(self._rng)

    def restore_callback_state(self) -> None:
        """Restores the state of callbacks, module and registered objects."""
        for restore in self._callback_state:
            restore()

    def restore_again(self) -> None:
        """Restores what later hooks of the rejected batch may have changed since `restore`."""
        self.module.restore()
        self._attributes.restore()
        self.restore_callback_state()

    def owners_changed(self) -> list[Any]:
        """Returns the modules and optimizers of which values in attributes have changed since."""
        return self._attributes.changed_owners()

    def crosses_change_of_groups(self, trainer: Trainer) -> bool:
        """Returns whether other parameters are trained now, or are in other groups."""
        pairs = zip(self._optimizers, adapter_of(trainer).optimizers_to_copy(), strict=True)
        same = all(saved.has_same_groups(optimizer) for saved, optimizer in pairs)
        return not same or any(p.requires_grad != trained for p, trained in self._trained)

    @property
    def kept_by_callbacks(self) -> tuple[str, ...]:
        """Attributes that have changed since, of the user's callbacks whose state is not known."""
        return self._of_callbacks.changed(
            of=lambda owner: not keeps_state(owner) and not hasattr(owner, "rewindable_state")
        )

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes, without the shared frozen weights."""
        modules = sum(each.nbytes for each in (self.module, *self._averages.values()))
        return modules + self._beside.nbytes + sum(saved.nbytes for saved in self._optimizers)


def snapshot_bytes(trainer: Trainer, pl_module: LightningModule) -> int:
    """Returns the size of a snapshot: trained weights, buffers, state of the optimizers."""
    weights = (p for p in pl_module.parameters() if p.requires_grad)
    adapter = adapter_of(trainer)
    left = adapter.parameters_to_leave()
    states = (s for o in adapter.optimizers_to_copy() for s in o.state.values())
    moments = (value for state in states for value in state.values())
    copied = (p for p in weights if id(p) not in left)
    tensors = (*copied, *pl_module.buffers(), *moments, *adapter.tensors_to_copy())
    return sum(memory_of(t) for t in tensors if isinstance(t, Tensor))


def incident_bytes(pl_module: LightningModule, *, reruns: bool) -> int:
    """Returns the bytes that an incident needs beside the snapshots.

    The buffers are copied at the start of each step. A step that is run again in isolation has
    gradients of its own, while those of the real step are kept, and two more copies of the buffers.

    Args:
        pl_module: the module in training.
        reruns: whether a callback runs steps again.
    """
    buffers = sum(memory_of(b) for b in pl_module.buffers())
    gradients = sum(memory_of(p) for p in pl_module.parameters() if p.requires_grad)
    return buffers + (gradients + 2 * buffers if reruns else 0)


class StepStart:
    """State that a step changes before it can be skipped.

    These are buffers, parameters that the program writes itself, values in attributes of the
    module, metrics, generators and loop counters.

    Args:
        trainer: in its fit.
        pl_module: the module in training.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._buffers = BufferGuard(pl_module)
        self._metrics = LoggedMetrics(pl_module)
        self.attributes = PlainAttributes(owners_in(trainer, pl_module, of_torch=False))
        self.position = 0
        self.loops: LoopState
        self._rng: dict[str, Any] = {}

    def capture(self, trainer: Trainer, *, position: int, written: Sequence[Tensor] = ()) -> None:
        """Captures the state, before the first batch of the step is fetched.

        Args:
            trainer: in its fit.
            position: of the batch in the replay ring.
            written: parameters that the program writes itself.
        """
        self.position = position
        self._buffers.capture(written)
        self.attributes.capture()
        self._metrics.capture(trainer)
        self.loops = LoopState(trainer)
        self._rng = capture_rng()

    def non_finite_buffers(self) -> set[tuple[int, str]]:
        """Returns id of the module and key of each buffer that was non-finite at the start."""
        return self._buffers.non_finite_buffers()

    def restore(self, trainer: Trainer) -> None:
        """Restores all state except loops and data, and clears the gradients."""
        self._buffers.restore()
        self.attributes.restore()
        self._metrics.restore(trainer)
        clear_gradients(trainer)
        restore_rng(self._rng)

    def had_finite(self, parameters: Iterable[Tensor]) -> bool:
        """Returns whether there is a finite copy of each of the parameters."""
        return self._buffers.had_finite(parameters)

    def restore_again(self) -> None:
        """Restores what later hooks of the rejected batch may have changed since `restore`."""
        self._buffers.restore()


def clear_gradients(trainer: Trainer) -> None:
    """Sets the gradients of an undone step to 0, as hooks of its batch may still read them.

    Before the next backward pass they must be None again, because an optimizer updates a parameter
    that has a gradient of 0. In automatic optimization Lightning sees to that.
    """
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=False)
