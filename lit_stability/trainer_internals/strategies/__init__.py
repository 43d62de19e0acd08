"""What differs between ways of training: one adapter for each, and the rest of the package asks it.

An adapter stands for one class of strategy, compared exactly: those of DeepSpeed and XLA are
subclasses of `DDPStrategy` that behave differently.
"""

from __future__ import annotations

from lit_stability.lightning_package import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Trainer,
)
from lit_stability.trainer_internals.strategies.adapter import Sharing, StrategyAdapter
from lit_stability.trainer_internals.strategies.ddp import DDPAdapter
from lit_stability.trainer_internals.strategies.fsdp2 import FSDP2Adapter
from lit_stability.trainer_internals.strategies.unsupported import UnsupportedAdapter

_ADAPTERS: dict[type, type[StrategyAdapter]] = {
    SingleDeviceStrategy: StrategyAdapter,
    DDPStrategy: DDPAdapter,
    ModelParallelStrategy: FSDP2Adapter,
}


def adapter_of(trainer: Trainer) -> StrategyAdapter:
    """Returns the adapter that answers for the strategy of a trainer."""
    return _ADAPTERS.get(type(trainer.strategy), UnsupportedAdapter)(trainer)


def sharing(trainer: Trainer) -> Sharing:
    """Returns whether each rank holds all weights, or a shard of them."""
    return adapter_of(trainer).sharing


__all__ = ["StrategyAdapter", "adapter_of", "sharing"]
