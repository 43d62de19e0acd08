"""Which strategies the suite was run under, and what the ranks have in common under each."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.optim import LBFGS

from lit_stability.distributed.collectives import Ranks

Sharing: TypeAlias = Literal["alone", "replicas", "shards", "untried"]


def sharing(trainer: Trainer) -> Sharing:
    """Whether each rank holds all weights, or a shard of them.

    By the strategy's very type: DeepSpeed's and XLA's are subclasses of what they are not.
    """
    strategy: Any = trainer.strategy
    if type(strategy) is SingleDeviceStrategy:
        return "alone"
    if type(strategy) is DDPStrategy and strategy._model_averaging_period is None:
        return "alone" if trainer.world_size == 1 else "replicas"
    if type(strategy) is ModelParallelStrategy and strategy._tensor_parallel_size == 1:
        return "alone" if trainer.world_size == 1 else "shards"
    return "untried"


def why_unsupported(trainer: Trainer) -> str:
    """The reason in words, for a strategy that `sharing` calls untried."""
    strategy: Any = trainer.strategy
    match type(strategy).__name__:
        case "DDPStrategy":
            return "with model averaging the ranks' gradients are not averaged at every step"
        case "ModelParallelStrategy":
            return "with tensor parallelism a rank's loss and gradients are not its share of a sum"
        case "FSDPStrategy":
            return (
                "FSDP1 keeps weights in flat shards, in which no parameter can be told apart, and "
                "whose format is fixed when they are made; "
                "use FSDP2, as ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)"
            )
        case "DeepSpeedStrategy":
            return "DeepSpeed steps in an engine of its own, which dropped gradients do not stop"
        case name if "XLA" in name:
            return "XLA records operations, and a look at their values on every step undoes that"
        case _:
            return "it was never run with the suite"


def ranks_of(trainer: Trainer, allowed: Collection[str]) -> Ranks | None:
    """The ranks that decide together; None for one rank, and for a strategy not allowed."""
    how = sharing(trainer)
    untried = how == "untried" and type(trainer.strategy).__name__ not in allowed
    if how == "alone" or untried or trainer.world_size == 1 or not dist.is_initialized():
        return None
    once_per_step = trainer.lightning_module.automatic_optimization and not any(
        isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers
    )
    replicas = how == "replicas"
    return Ranks(replicas=replicas, overlapped=replicas and once_per_step)


def reshard(pl_module: LightningModule) -> None:
    """Give FSDP2's modules their shards back: a forward pass without backward leaves them whole."""
    for module in pl_module.modules():
        if callable(back := getattr(module, "reshard", None)) and hasattr(module, "unshard"):
            back()
