"""The strategies that were tested with the suite, and what their ranks share."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch.optim import LBFGS

from lit_stability.distributed.collectives import Ranks
from lit_stability.lightning_package import (
    DDPStrategy,
    LightningModule,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Trainer,
)

_USUAL_WAIT = timedelta(minutes=30)
"""The default ``timeout`` of Lightning's strategies."""

Sharing: TypeAlias = Literal["alone", "replicas", "shards", "untried"]


def sharing(trainer: Trainer) -> Sharing:
    """Returns whether each rank holds all weights, or a shard of them.

    Compares the exact type of the strategy: those of DeepSpeed and XLA are subclasses of
    `DDPStrategy` that behave differently.
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
    """Returns the reason for a strategy that `sharing` calls "untried", as text."""
    strategy: Any = trainer.strategy
    match type(strategy).__name__:
        case "DDPStrategy":
            return "with model averaging the ranks' gradients are not averaged at every step"
        case "ModelParallelStrategy":
            return (
                "with tensor parallelism the loss and gradients of a rank are not a share of a sum"
            )
        case "FSDPStrategy":
            return (
                "FSDP1 keeps weights in flat shards, in which parameters cannot be distinguished, "
                "and fixes the dtype of its shards when it creates them; "
                "use FSDP2, as ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)"
            )
        case "DeepSpeedStrategy":
            return "DeepSpeed steps in its own engine, which removed gradients do not stop"
        case name if "XLA" in name:
            return "XLA records operations lazily, and reading values on every step prevents that"
        case _:
            return "this strategy was never tested with the suite"


def ranks_of(trainer: Trainer, allowed: Collection[str]) -> Ranks | None:
    """Returns the ranks that decide together; None for one rank or an unsupported strategy."""
    kind = sharing(trainer)
    untried = kind == "untried" and type(trainer.strategy).__name__ not in allowed
    if kind == "alone" or untried or trainer.world_size == 1 or not dist.is_initialized():
        return None
    once_per_step = trainer.lightning_module.automatic_optimization and not any(
        isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers
    )
    replicas = kind == "replicas"
    return Ranks(replicas=replicas, overlapped=replicas and once_per_step)


def longest_wait(trainer: Trainer) -> float:
    """Returns for how many seconds ranks may wait for each other, if the user allows it; else 0.

    That is a ``timeout`` of the strategy above its default of 30 minutes.
    """
    given = getattr(trainer.strategy, "_timeout", None)
    return given.total_seconds() if given is not None and given > _USUAL_WAIT else 0.0


def reshard(pl_module: LightningModule) -> None:
    """Reshards FSDP2 modules: a forward pass without a backward pass leaves them unsharded."""
    for module in pl_module.modules():
        if callable(method := getattr(module, "reshard", None)) and hasattr(module, "unshard"):
            method()
