"""What the suite asks a way of training, answered for a single rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.optim import LBFGS

from lit_stability.distributed.collectives import Ranks
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals.trainer_view import (
    full_checkpoint,
    loss_scale_on_device,
    loss_scaler,
)

_USUAL_WAIT = timedelta(minutes=30)
"""The default ``timeout`` of Lightning's strategies."""

Sharing: TypeAlias = Literal["alone", "replicas", "shards", "untried"]
"""Whether each rank holds all weights, or a shard of them; "untried" if the suite must not act."""


class StrategyAdapter:
    """Answers for one strategy; this class does for a single device, others for several ranks.

    Args:
        trainer: in its fit, or at its ``setup``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._strategy: Any = trainer.strategy

    @property
    def sharing(self) -> Sharing:
        """Whether each rank holds all weights, or a shard of them."""
        return "alone"

    @property
    def why_unsupported(self) -> str:
        """The reason why `sharing` is "untried", as text."""
        return ""

    @property
    def may_be_tried(self) -> bool:
        """Whether the suite may act if the user asks for it, where `sharing` is "untried"."""
        return True

    @property
    def gathers_weights(self) -> bool:
        """Whether a forward pass gathers weights of other ranks, so that all must run it."""
        return self.sharing == "shards"

    @property
    def why_no_rerun(self) -> str | None:
        """Why a step cannot be run again beside training; None if it can."""
        return None

    @property
    def trains_own_tensors(self) -> bool:
        """Whether the optimizers train the module's parameters, whose memory is there all along."""
        return True

    @property
    def steps_now(self) -> bool:
        """Whether the optimizer will take a step, in ``on_before_optimizer_step``."""
        return True

    @property
    def why_precision_fixed(self) -> str | None:
        """Why the precision cannot change during a fit, whatever it is; None if it can."""
        return None

    @property
    def why_half_fixed(self) -> str | None:
        """Why half-precision weights cannot be converted during a fit; None if they can."""
        return None

    @property
    def why_no_good_checkpoint(self) -> str | None:
        """Why `LastKnownGood` cannot save what it could resume from; None if it can."""
        untried = self.sharing == "untried" and self._trainer.world_size > 1
        return self.why_unsupported if untried else None

    @property
    def saves_incidents_together(self) -> bool:
        """Whether `save_incident` must be called on all ranks; else on rank 0 only."""
        return True

    @property
    def longest_wait(self) -> float:
        """For how many seconds ranks may wait for each other, if the user allows it; else 0.

        That is a ``timeout`` of the strategy above its default of 30 minutes.
        """
        given = getattr(self._strategy, "_timeout", None)
        return given.total_seconds() if given is not None and given > _USUAL_WAIT else 0.0

    def ranks(self, allowed: Collection[str] = ()) -> Ranks | None:
        """Returns the ranks that decide together; None for one rank or an unsupported strategy.

        Args:
            allowed: names of strategy classes that the user has allowed.
        """
        tried = self.may_be_tried and type(self._strategy).__name__ in allowed
        untried = self.sharing == "untried" and not tried
        one = self.sharing == "alone" or self._trainer.world_size == 1
        if one or untried or not dist.is_initialized():
            return None
        replicas = self.sharing == "replicas"
        return Ranks(replicas=replicas, overlapped=replicas and _steps_once(self._trainer))

    def can_measure(self) -> bool:
        """Returns whether the optimizers hold parameters that have gradients."""
        return True

    def attach(self) -> None:
        """Prepares the optimizers for the suite, before its first measurement."""

    def detach(self) -> None:
        """Undoes what `attach` did, at the end of the fit."""

    def read_gradients(self) -> None:
        """Gives the parameters of `named_parameters` their gradients, before a step."""

    def loss_scale(self) -> Tensor | None:
        """Returns the factor of the losses that `scaled_loss` returns; None without one."""
        return loss_scale_on_device(loss_scaler(self._trainer))

    def scaled_loss(self, loss: Tensor) -> Tensor:
        """Returns the loss of ``on_before_backward`` times the loss scale."""
        return loss

    def optimizers_to_copy(self) -> list[Any]:
        """Returns the optimizers whose state belongs to a snapshot."""
        return list(self._trainer.optimizers)

    def tensors_to_copy(self) -> list[Tensor]:
        """Returns what a snapshot must copy beside the module and the optimizers."""
        return []

    def parameters_to_leave(self) -> set[int]:
        """Returns ids of the module's parameters that a snapshot need not copy."""
        return set()

    def counts(self) -> Any:
        """Returns counters beside Lightning's that a rejected step must not change."""
        return None

    def load_counts(self, counts: Any) -> None:
        """Restores what `counts` returned."""

    def weights_restored(self) -> None:
        """Follows a restore of what `tensors_to_copy` returned."""

    def named_parameters(self, pl_module: LightningModule) -> Iterable[tuple[str, Tensor]]:
        """Returns name and tensor of what this rank has of each parameter, the same on all ranks.

        Their gradients are there in ``on_before_optimizer_step``.
        """
        return pl_module.named_parameters()

    def weights_in_use(self) -> Mapping[str, Tensor]:
        """Returns the weights that the module computes with, where the optimizer has others."""
        return {}

    def part_shares(self, pl_module: LightningModule) -> Mapping[int, float] | None:
        """Returns the weight of this rank's elements in a sum over all ranks, by id of the tensor.

        None unless a plain tensor is only a part of a parameter, which may be empty on a rank.
        """
        return None

    def eager_step(self, pl_module: LightningModule) -> Callable[..., Any]:
        """Returns the module's ``training_step``, uncompiled, for a run beside training."""
        compiled = getattr(pl_module, "_compiler_ctx", None)
        step: Callable[..., Any] = (
            compiled["original_training_step"] if compiled else pl_module.training_step
        )
        return step

    def reshard(self, pl_module: LightningModule) -> None:
        """Frees what a forward pass without a backward pass has gathered from other ranks."""

    def module_converted(self) -> None:
        """Follows a change of the dtype of weights."""

    def checkpoint(self) -> dict[str, Any]:
        """Returns the checkpoint of this rank; its tensors are not copies. All ranks must call it.

        Of sharded weights and optimizer states each rank has its shards. Of replicas rank 0 has
        them, and the others have neither.
        """
        return full_checkpoint(self._trainer)

    def damaged(self) -> str | None:
        """Returns what is non-finite in weights that `checkpoint` has in a form of a library."""
        return None

    def own_buffers(self, pl_module: LightningModule) -> dict[str, Any]:
        """Returns the buffers that this rank does not share with rank 0, by name.

        What a checkpoint has of them are those of rank 0.
        """
        saved = pl_module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in pl_module.named_buffers() if name in saved}

    def save_incident(self, path: Path) -> None:
        """Saves a Lightning checkpoint of the state at an incident, for later analysis."""
        self._trainer.save_checkpoint(path, weights_only=False)


def _steps_once(trainer: Trainer) -> bool:
    """Whether a backward pass is known to be the last before a step of the optimizer."""
    searches = any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers)
    return trainer.lightning_module.automatic_optimization and not searches
