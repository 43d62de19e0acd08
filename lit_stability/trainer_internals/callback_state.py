"""State that other objects keep beside the training state, and that a rollback takes back.

Weight averages, the best checkpoints, patience counters, and what a user registers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging

from lit_stability.trainer_internals.trainer_view import callbacks_of
from lit_stability.training_state.snapshot import ModuleSnapshot

Restore: TypeAlias = Callable[[], None]


class Stateful(Protocol):
    """Anything that gives its state away and takes it back."""

    def state_dict(self) -> Any:
        """The state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Put it back."""


def capture_callback_state(
    trainer: Trainer,
    pl_module: LightningModule,
    registered: Iterable[Stateful],
    averages: dict[int, ModuleSnapshot],
) -> list[Restore]:
    """Remember the state of callbacks, module and registered objects; each result puts one back.

    Args:
        trainer: whose callbacks.
        pl_module: in training.
        registered: further objects.
        averages: copies of averaged weights, to be reused from capture to capture.
    """
    restores: list[Restore] = []
    for owner in [*callbacks_of(trainer), pl_module]:
        if hasattr(owner, "rewindable_state"):
            restores.append(_hook(owner))
        elif isinstance(owner, ModelCheckpoint | EarlyStopping):
            restores.append(_stateful(owner))
            restores.append(_attributes(owner))
        elif isinstance(owner, WeightAveraging):
            restores.append(_average(owner, averages))
            restores.append(_attributes(owner))
    return [*restores, *(_stateful(each) for each in registered)]


_ATTRIBUTES = (
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
    "_latest_update_step",
    "_latest_update_epoch",
    "stopping_reason",
    "stopping_reason_message",
)
"""What Lightning's callbacks leave out of their ``state_dict``."""


def _hook(owner: Any) -> Restore:
    state = owner.rewindable_state()
    return lambda: owner.load_rewindable_state(state)


def _stateful(owner: Stateful) -> Restore:
    state = copy.deepcopy(owner.state_dict())
    return lambda: owner.load_state_dict(copy.deepcopy(state))


def _attributes(owner: Any) -> Restore:
    values = {name: getattr(owner, name) for name in _ATTRIBUTES if hasattr(owner, name)}
    return lambda: vars(owner).update(values)


def _average(owner: WeightAveraging, averages: dict[int, ModuleSnapshot]) -> Restore:
    if owner._average_model is None:
        return lambda: None
    snapshot = averages.setdefault(id(owner), ModuleSnapshot())
    snapshot.capture(owner._average_model)
    return snapshot.restore
