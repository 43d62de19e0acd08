"""Checks the callbacks of a Trainer while it is created, before Lightning does.

Lightning calls the entry point of this package there, see `lit_stability.registration`, without
the Trainer: it is found in the frames of the callers. Where it is not, nothing is checked here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lit_stability.callbacks.default_suite import name_in_suite
from lit_stability.callbacks.hooks import StabilityCallback, implements
from lit_stability.lightning_package import Callback, Trainer

_FRAMES = 10
"""Callers to look at; the Trainer is three or four above."""


def check_new_trainer() -> None:
    """Checks the callbacks of the Trainer that is being created.

    Raises:
        TypeError: if a list of callbacks is inside the list.
        ValueError: if a callback of this package is there twice.
    """
    trainer = _being_created()
    if trainer is not None:
        check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Checks the callbacks of a Trainer.

    Raises:
        TypeError: if a list of callbacks is inside the list.
        ValueError: if a callback of this package is there twice.

    >>> from lit_stability import GradientMonitor, stability_callbacks
    >>> check_callbacks([stability_callbacks()])
    Traceback (most recent call last):
    ...
    TypeError: the Trainer's callbacks have a list in them, which begins with GradientMonitor: \
unpack it, as in Trainer(callbacks=[*stability_callbacks(), ...])
    """
    for each in callbacks:
        if isinstance(each, (list, tuple)) and each and isinstance(each[0], Callback):
            raise TypeError(
                "the Trainer's callbacks have a list in them, which begins with "
                f"{type(each[0]).__name__}: unpack it, as in "
                "Trainer(callbacks=[*stability_callbacks(), ...])"
            )
    ours = [each for each in callbacks if isinstance(each, StabilityCallback)]
    own = [each for each in ours if type(each).__module__.startswith("lit_stability.")]
    for each in own:
        cls = type(each)
        twice = sum(type(other) is cls for other in own) > 1
        if not twice or implements(each, "probe_readings"):
            continue
        name = name_in_suite(cls)
        advice = (
            f"; stability_callbacks() has one: give it options with "
            f"stability_callbacks({name}=dict(...)), or replace it with {name}={cls.__name__}(...)"
            if name
            else "; remove one"
        )
        raise ValueError(f"the Trainer's callbacks have {cls.__name__} twice{advice}")


def _being_created() -> Trainer | None:
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        # Not by getattr: `trainer` of a user's object may be a property that raises.
        trainer = getattr(frame.f_locals.get("self"), "__dict__", {}).get("trainer")
        if isinstance(trainer, Trainer):
            return trainer
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None
