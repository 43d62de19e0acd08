"""State of other objects that a rollback restores together with the training state.

This is the state of callbacks (weight averages, best checkpoints, patience counters), of the
module, and of objects that the user registers.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias
from weakref import WeakSet

from lit_stability.lightning_choice import LIGHTNING_ROOTS, suite_logger
from lit_stability.lightning_package import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    LightningModule,
    ModelCheckpoint,
    Trainer,
    WeightAveraging,
)
from lit_stability.trainer_internals.trainer_view import callbacks_of
from lit_stability.training_state.snapshot import ModuleSnapshot

log = suite_logger()

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
            if isinstance(owner, ModelCheckpoint) and getattr(owner, "save_last", "") == "link":
                restores.append(_last_link(owner, trainer))
            restores.append(_stateful(owner))
            restores.append(_attributes(owner))
        elif isinstance(owner, WeightAveraging):
            restores.append(_average(owner, averages))
            restores.append(_attributes(owner))
        elif isinstance(owner, BaseFinetuning):
            restores.append(_attributes(owner))
        if keeps_state(owner):
            restores.append(_stateful_of_the_user(owner))
    return [*restores, *(_stateful(owner) for owner in registered)]


def keeps_state(owner: Any) -> bool:
    """Returns whether a callback of the user defines how to save and restore its state.

    Not if it has a ``rewindable_state``, which says what a rollback restores.
    """
    if not isinstance(owner, Callback) or hasattr(owner, "rewindable_state"):
        return False
    if isinstance(owner, ModelCheckpoint | EarlyStopping):
        return False
    methods = (getattr(owner.__class__, name) for name in ("state_dict", "load_state_dict"))
    return all(method.__module__.split(".")[0] not in _PACKAGES for method in methods)


_PACKAGES = (*LIGHTNING_ROOTS, "lit_stability")
_ATTRIBUTES = (
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
    "_latest_update_step",
    "_latest_update_epoch",
    "_internal_optimizer_metadata",
    "previous_backbone_lr",
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
    values = {name: copy.deepcopy(vars(owner)[name]) for name in _ATTRIBUTES if name in vars(owner)}
    return lambda: vars(owner).update(copy.deepcopy(values))


def _stateful_of_the_user(owner: Any) -> Restore:
    """Code that expects to be called when a checkpoint is saved or loaded may fail now."""
    try:
        restore = _stateful(owner)
    except Exception as error:
        return functools.partial(_report, owner, error)

    def attempt() -> None:
        try:
            restore()
        except Exception as error:
            _report(owner, error)

    return attempt


def _report(owner: Any, error: Exception) -> None:
    if type(owner) not in _REPORTED:
        _REPORTED.add(type(owner))
        log.warning(
            "the state of %s is not rolled back: %s: %s. Give it rewindable_state() and "
            "load_rewindable_state(state)",
            type(owner).__name__,
            type(error).__name__,
            error,
        )


_REPORTED: WeakSet[type] = WeakSet()
"""Classes of callbacks for which it was logged; a callback need not be hashable."""


def _last_link(owner: ModelCheckpoint, trainer: Trainer) -> Restore:
    """Has ``last.ckpt`` point again to what it pointed to; called before the state is restored.

    The file that it points to now may have been quarantined, so that nothing could be loaded.
    """
    path = owner.last_model_path
    target = os.readlink(path) if path and os.path.islink(path) else None

    def restore() -> None:
        if not trainer.is_global_zero:
            return
        if owner.last_model_path and os.path.islink(owner.last_model_path):
            os.remove(owner.last_model_path)
        if target is not None and not os.path.lexists(path):
            os.symlink(target, path)

    return restore


def _average(owner: WeightAveraging, averages: dict[int, ModuleSnapshot]) -> Restore:
    if owner._average_model is None:
        return lambda: None
    snapshot = averages.setdefault(id(owner), ModuleSnapshot())
    snapshot.capture(owner._average_model)
    return snapshot.restore
