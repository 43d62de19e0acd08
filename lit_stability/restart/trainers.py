"""Builds a new Trainer for every fit with the user's function, and checks it.

May import Lightning.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lit_stability.lightning_choice import mixed_packages
from lit_stability.lightning_package import Trainer
from lit_stability.restart.torchrun import is_under_torchrun
from lit_stability.trainer_internals import callbacks_of

_OPTIONS = (
    *("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "overfit_batches"),
    *("precision", "val_check_interval"),
)
"""Options that ``make_trainer`` may be called with."""


class Trainers:
    """Builds trainers, and rejects those that cannot be used for a restart.

    Args:
        make_trainer: returns a new Trainer; accepts options that override its own.

    Raises:
        ValueError: if ``make_trainer`` does not accept these options.
    """

    def __init__(self, make_trainer: Callable[..., Trainer]) -> None:
        _check_signature(make_trainer)
        self._make = make_trainer
        self._known: list[weakref.ref[Any]] = []

    def make(self, overrides: Mapping[str, Any]) -> Trainer:
        """Builds a new trainer with these options.

        Raises:
            ValueError: if the trainer is not new, or ignores an option.
            RuntimeError: if the trainer has several devices, and torchrun has not started them.
        """
        trainer = self._make(**overrides)
        if not isinstance(trainer, Trainer):
            mixed = mixed_packages(type(trainer))
            found = f"one of {mixed}" if mixed else repr(trainer)
            raise ValueError(f"make_trainer must return a Trainer, got {found}")
        self._check_new(trainer)
        _check_options(trainer, overrides)
        _check_devices(trainer)
        self._known += [weakref.ref(each) for each in (trainer, *callbacks_of(trainer))]
        return trainer

    def _check_new(self, trainer: Trainer) -> None:
        known = {id(each) for ref in self._known if (each := ref()) is not None}
        for each in (trainer, *callbacks_of(trainer)):
            if id(each) in known:
                raise ValueError(
                    f"make_trainer returned the {type(each).__name__} of an earlier fit; trainers "
                    "and callbacks hold the state of one fit: create new ones in make_trainer"
                )


def own_callbacks(trainer: Trainer) -> list[Any]:
    """Returns the trainer's list of callbacks, which the caller may extend."""
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def _check_options(trainer: Trainer, overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        found = getattr(trainer, name)
        if found != value:
            raise ValueError(
                f"make_trainer(**{overrides}) returned a Trainer with {name}={found!r}: the "
                "overrides must take precedence, as in Trainer(**{**options, **overrides})"
            )


def _check_devices(trainer: Trainer) -> None:
    if trainer.world_size > 1 and not is_under_torchrun():
        raise RuntimeError(
            f"fit_with_recovery needs torchrun to restart the {trainer.world_size} ranks of this "
            "trainer, because a crashed rank cannot be restarted in its process: start the program "
            f"with torchrun --nproc-per-node={trainer.world_size} --max-restarts=3 PROGRAM"
        )


def _check_signature(make_trainer: Callable[..., Trainer]) -> None:
    if not callable(make_trainer):
        raise ValueError(
            f"make_trainer must be a function that returns a new Trainer, got {make_trainer!r}"
        )
    try:
        inspect.signature(make_trainer).bind(**dict.fromkeys(_OPTIONS))
    except TypeError as error:
        raise ValueError(
            f"make_trainer must accept Trainer options that override its own, such as "
            f"accumulate_grad_batches ({error}); write def make_trainer(**overrides): return "
            "Trainer(**{**options, **overrides})"
        ) from error
