"""State of other objects that a rollback restores together with the training state.

This is the state of callbacks (weight averages, best checkpoints, patience counters), of the
module, and of objects that the user registers.
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
    """An object with ``state_dict`` and ``load_state_dict``."""

    def state_dict(self) -> Any:
        """Returns the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restores a state."""


def capture_callback_state(
    trainer: Trainer,
    pl_module: LightningModule,
    registered: Iterable[Stateful],
    averages: dict[int, ModuleSnapshot],
) -> list[Restore]:
    """Captures the state of callbacks, module and registered objects.

    Args:
        trainer: owner of the callbacks.
        pl_module: the module in training.
        registered: further objects.
        averages: memory for copies of averaged weights, reused by later captures.

    Returns:
        Functions, each of which restores one captured state.
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
    return [*restores, *(_stateful(owner) for owner in registered)]


_ATTRIBUTES = (
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
    "_latest_update_step",
    "_latest_update_epoch",
    "stopping_reason",
    "stopping_reason_message",
)
"""Attributes that Lightning's callbacks do not include in their ``state_dict``."""


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
