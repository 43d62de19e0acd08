"""A new Trainer for every fit, made by the user and checked to be one.

May import Lightning.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer

from lit_stability.trainer_internals import callbacks_of

_OPTIONS = (
    *("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "overfit_batches"),
    *("precision", "val_check_interval"),
)
"""What ``make_trainer`` may be asked for."""


class Trainers:
    """Makes trainers, and refuses those that a fit cannot be begun again with.

    Args:
        make_trainer: returns a new Trainer; takes options that override its own.

    Raises:
        ValueError: if it does not take them.
    """

    def __init__(self, make_trainer: Callable[..., Trainer]) -> None:
        _check_signature(make_trainer)
        self._make = make_trainer
        self._known: list[weakref.ref[Any]] = []

    def make(self, overrides: Mapping[str, Any]) -> Trainer:
        """A new trainer with these options.

        Raises:
            ValueError: if it is not new, or has other options.
            RuntimeError: if it has several devices.
        """
        trainer = self._make(**overrides)
        if not isinstance(trainer, Trainer):
            raise ValueError(f"make_trainer must return a Trainer, got {trainer!r}")
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
                    "and callbacks hold the state of one fit: build new ones in make_trainer"
                )


def own_callbacks(trainer: Trainer) -> list[Any]:
    """The trainer's own list of callbacks, to add to."""
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def _check_options(trainer: Trainer, overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        found = getattr(trainer, name)
        if found != value:
            raise ValueError(
                f"make_trainer(**{overrides}) returned a Trainer with {name}={found!r}: let the "
                "overrides win, as in Trainer(**{**options, **overrides})"
            )


def _check_devices(trainer: Trainer) -> None:
    if trainer.world_size > 1:
        raise RuntimeError(
            f"fit_with_recovery works on one device, this trainer has {trainer.world_size}: ranks "
            "that crash one by one cannot be begun again in their processes. Restart them "
            "together, as torchrun --max-restarts does, with ckpt_path"
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
            f"make_trainer must take options of the Trainer that override its own, such as "
            f"accumulate_grad_batches ({error}); write def make_trainer(**overrides): return "
            "Trainer(**{**options, **overrides})"
        ) from error
