"""Checks at ``setup`` that a callback can work with its trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_stability.callbacks.gradient_monitor import GradientMonitor
from lit_stability.callbacks.gradient_monitor.validation import require_package
from lit_stability.callbacks.hooks import implements
from lit_stability.lightning_package import Callback, Trainer
from lit_stability.trainer_internals import adapter_of, callbacks_of, sharing


def require_monitor(trainer: Trainer, callback: Callback) -> None:
    """Checks that a callback has a `GradientMonitor` before it, and is there only once.

    Raises:
        ValueError: if not; the message shows the line to write.
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
    duplicated = sum(type(c) is type(callback) for c in callbacks) > 1
    if duplicated and not implements(callback, "probe_readings"):
        raise ValueError(
            f"the trainer has {type(callback).__name__} twice, found "
            f"{[type(c).__name__ for c in callbacks]}; remove one of them"
        )


def gather_of(trainer: Trainer) -> Callable[[Any], list[Any]]:
    """Returns `GradientMonitor.gather` of the trainer's monitor, which `require_monitor` ensures.

    Args:
        trainer: in its fit.
    """
    return monitor_of(trainer).gather


def monitor_of(trainer: Trainer) -> GradientMonitor:
    """Returns the trainer's `GradientMonitor`, which `require_monitor` ensures."""
    return next(c for c in callbacks_of(trainer) if isinstance(c, GradientMonitor))


def run_of(trainer: Trainer) -> str:
    """Returns the id of the run, see `GradientMonitor.run_id`; empty if there is none."""
    monitors = (c for c in callbacks_of(trainer) if isinstance(c, GradientMonitor))
    return next((m.run_id for m in monitors if m.run_id is not None), "")


def shares_numbers(trainer: Trainer) -> bool:
    """Returns whether `GradientMonitor` exchanges its numbers between all ranks, or there is one.

    Args:
        trainer: in its fit.
    """
    return trainer.world_size == 1 or _is_allowed(trainer) or sharing(trainer) != "untried"


def _is_allowed(trainer: Trainer) -> bool:
    strategy = type(trainer.strategy).__name__
    monitors = [c for c in callbacks_of(trainer) if isinstance(c, GradientMonitor)]
    allowed = any(strategy in monitor.allow_strategies for monitor in monitors)
    return allowed and adapter_of(trainer).may_be_tried


def require_supported_strategy(trainer: Trainer, callback: Callback) -> None:
    """Checks that a callback supports the strategy, or that the user has allowed the strategy.

    Raises:
        RuntimeError: if not; the message has the reason and the alternatives.
    """
    strategy, adapter = type(trainer.strategy).__name__, adapter_of(trainer)
    if adapter.sharing == "untried" and not _is_allowed(trainer):
        raise RuntimeError(
            f"{type(callback).__name__} does not support {strategy}: {adapter.why_unsupported}. "
            "Train on one device, with DDP, FSDP or DeepSpeed's ZeRO; or use only "
            f"GradientMonitor, which does not act{_way_to_try(trainer)}"
        )


def _way_to_try(trainer: Trainer) -> str:
    name = type(trainer.strategy).__name__
    if not adapter_of(trainer).may_be_tried:
        return ""
    return (
        f"; or, if {name} differs from a supported one only in how its processes start, "
        f"register_strategy({name}, like='ddp'); or try it with "
        f"GradientMonitor(allow_strategies=({name!r},))"
    )


def require_whole_optimizers(trainer: Trainer, callback: Callback) -> None:
    """Checks that no optimizer shards its state over ranks and gathers it in collectives.

    Raises:
        RuntimeError: if one does; the message has its class.
    """
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "consolidate_state_dict"):
            raise RuntimeError(
                f"{type(callback).__name__} cannot restore the state of a "
                f"{type(optimizer).__name__}, because each rank holds only a part of it; use FSDP2 "
                "to shard optimizer state"
            )
