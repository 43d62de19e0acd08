"""What a callback that acts asks of its trainer; it refuses at ``setup`` otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.callbacks.gradient_monitor.validation import require_package
from lit_stability.callbacks.hooks import implements
from lit_stability.trainer_internals import callbacks_of, sharing, why_unsupported


def require_monitor(trainer: Trainer, callback: Callback) -> None:
    """Refuse a callback that has no `GradientMonitor` before it, or one like it beside it.

    Raises:
        ValueError: naming the line to write.
    """
    require_package(trainer, callback)
    callbacks = callbacks_of(trainer)
    before = callbacks[: callbacks.index(callback)]
    if not any(isinstance(c, GradientMonitor) for c in before):
        name = type(callback).__name__
        raise ValueError(
            f"{name} needs a GradientMonitor before it in the trainer's callbacks, found "
            f"{[type(c).__name__ for c in callbacks]}; write "
            f"Trainer(callbacks=[GradientMonitor(), ..., {name}()])"
        )
    twice = sum(type(c) is type(callback) for c in callbacks) > 1
    if twice and not implements(callback, "probe_readings"):
        raise ValueError(
            f"the trainer has {type(callback).__name__} twice, found "
            f"{[type(c).__name__ for c in callbacks]}; leave one of them out"
        )


def gather_of(trainer: Trainer) -> Callable[[Any], list[Any]]:
    """Returns `GradientMonitor.gather` of the trainer's monitor, which `require_monitor` ensures.

    Args:
        trainer: in its fit.
    """
    return next(c.gather for c in callbacks_of(trainer) if isinstance(c, GradientMonitor))


def require_supported_strategy(trainer: Trainer, callback: Callback) -> None:
    """Refuse a callback that acts under a strategy that it was never run under.

    Raises:
        RuntimeError: saying why, and what can be done.
    """
    strategy = type(trainer.strategy).__name__
    monitors = [c for c in callbacks_of(trainer) if isinstance(c, GradientMonitor)]
    allowed = any(strategy in monitor.allow_strategies for monitor in monitors)
    if sharing(trainer) == "untried" and not allowed:
        raise RuntimeError(
            f"{type(callback).__name__} was not run under {strategy}: {why_unsupported(trainer)}. "
            "Train on one device, with DDP or with FSDP2, keep GradientMonitor alone, which only "
            f"observes, or try it with GradientMonitor(allow_strategies=({strategy!r},))"
        )


def require_whole_optimizers(trainer: Trainer, callback: Callback) -> None:
    """Refuse optimizers that hold a part of their state only, and gather it in collectives.

    Raises:
        RuntimeError: naming the optimizer.
    """
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "consolidate_state_dict"):
            raise RuntimeError(
                f"{type(callback).__name__} cannot put back the state of a "
                f"{type(optimizer).__name__}, which each rank holds a part of; use FSDP2 to "
                "shard optimizer state"
            )
