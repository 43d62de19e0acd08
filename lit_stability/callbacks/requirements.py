"""What a callback that acts asks of its trainer; it refuses at ``setup`` otherwise."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.trainer_state import callbacks_of


def require_monitor(trainer: Trainer, callback: Callback) -> None:
    """Refuse a callback that has no `GradientMonitor` before it in the trainer.

    Raises:
        ValueError: naming the line to write.
    """
    callbacks = callbacks_of(trainer)
    before = callbacks[: callbacks.index(callback)]
    if not any(isinstance(c, GradientMonitor) for c in before):
        name = type(callback).__name__
        raise ValueError(
            f"{name} needs a GradientMonitor before it in the trainer's callbacks, found "
            f"{[type(c).__name__ for c in callbacks]}; write "
            f"Trainer(callbacks=[GradientMonitor(), ..., {name}()])"
        )


def require_one_device(trainer: Trainer, callback: Callback) -> None:
    """Refuse a callback that acts in a trainer with several devices.

    Raises:
        RuntimeError: saying why, and what can be done.
    """
    if trainer.world_size > 1:
        raise RuntimeError(
            f"{type(callback).__name__} acts on one device, this trainer has {trainer.world_size}: "
            "what one rank alone decides would leave the others waiting. Train on one device, or "
            "keep GradientMonitor alone, which only observes"
        )
