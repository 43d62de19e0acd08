"""The optimizer step at hand, kept so that it can be taken again beside training.

Weights, gradients, buffers, generators and metrics are as before afterwards.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_stability.diagnosis.nonfinite import NonFiniteOrigin, locate_nonfinite
from lit_stability.measurement.half_precision import HALF, cast
from lit_stability.measurement.norms import dense, norms_of, to_host, total
from lit_stability.measurement.tensor_tree import size_of
from lit_stability.trainer_internals.isolation import isolated_step
from lit_stability.trainer_internals.precision import is_half
from lit_stability.trainer_internals.strategies import reshard, sharing
from lit_stability.trainer_internals.trainer_view import loss_scaler
from lit_stability.training_state.rng import capture_rng, restore_rng


@dataclass(frozen=True)
class Outcome:
    """What a step gives: its loss, and the norm of its gradients, unscaled and unclipped."""

    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        """Whether both are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class _Taken:
    batch: Any
    batch_idx: int
    rng: dict[str, Any]


class RecordedStep:
    """The batches of the optimizer step being taken, with the generators before each.

    Batches are held on the device, not copied; those of one accumulation window, ``max_bytes`` at
    most: beyond it the oldest are let go.

    Args:
        max_bytes: of the batches held.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self._max_bytes = max_bytes
        self._taken: list[_Taken] = []

    def batch_started(self, batch: Any, batch_idx: int) -> None:
        """Hold a batch that is about to be trained on."""
        self._taken.append(_Taken(batch, batch_idx, capture_rng()))
        while len(self._taken) > 1 and sum(size_of(t.batch) for t in self._taken) > self._max_bytes:
            self._taken.pop(0)

    def forget(self) -> None:
        """Let go of the batches: the step is over."""
        self._taken = []

    def obstacle(self, trainer: Trainer) -> str | None:
        """Why the step cannot be taken again, or None."""
        if not trainer.lightning_module.automatic_optimization:
            return "in manual optimization a training_step cannot be run without its update"
        return None if self._taken else "its batch is not kept"

    def rerun(self, trainer: Trainer, pl_module: LightningModule, *, float32: bool) -> Outcome:
        """Take the step again, in the precision at hand or with every number in float32.

        Under FSDP2 all ranks are to call it, as they gather weights; under DDP each is on its own.

        Args:
            trainer: in its step, or at the end of its batch.
            pl_module: in training.
            float32: without autocast, and with half-precision weights converted.
        """
        with _beside(trainer, pl_module, float32):
            losses = []
            for taken in self._taken:
                loss = _loss(trainer, pl_module, taken, float32)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach().reshape(1).float())
            grads = [dense(p.grad) for p in pl_module.parameters() if p.grad is not None]
            host = to_host({"loss": losses, "norms": norms_of(grads)})
        scaler = None if float32 else loss_scaler(trainer)
        scale = 1.0 if scaler is None else float(scaler.get_scale()) or 1.0
        return Outcome(sum(host["loss"]) / scale, total(host["norms"]) / scale)

    @contextmanager
    def rerun_losses(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> Iterator[Callable[[], Iterator[Tensor]]]:
        """The forward pass of the step again, in float32; what is computed inside stays beside.

        Yields what gives each batch's share of the loss, with its graph, as often as it is called.
        Parameters have copies in their place meanwhile, in their order.

        Args:
            trainer: in its step, or at the end of its batch; not where parameters are sharded.
            pl_module: in training.
        """
        with _beside(trainer, pl_module, True):
            yield lambda: (_loss(trainer, pl_module, taken, True) for taken in self._taken)

    def locate(
        self, trainer: Trainer, pl_module: LightningModule, gather: Callable[[Any], list[Any]]
    ) -> NonFiniteOrigin | None:
        """Find the operation that made the step's first NaN or Inf, in the precision at hand.

        Args:
            trainer: in its step, or at the end of its batch.
            pl_module: in training.
            gather: what each rank says; under FSDP2 all ranks are to call this, and search the
                backward pass together or not at all, as they exchange gradients in it.
        """
        forward_only = False
        if sharing(trainer) == "shards":
            own = self.rerun(trainer, pl_module, float32=False)
            forward_only = not all(gather(math.isfinite(own.loss)))
        origins = []
        with _beside(trainer, pl_module, False):
            for taken in self._taken:

                def step(taken: _Taken = taken) -> Tensor:
                    loss = _loss(trainer, pl_module, taken, False)
                    return loss.detach() if forward_only else loss

                origins.append(locate_nonfinite(pl_module, step))
        if forward_only:
            reshard(pl_module)
        return next((each for each in origins if each is not None), None)


@contextmanager
def _beside(trainer: Trainer, pl_module: LightningModule, float32: bool) -> Iterator[None]:
    """Let nothing that is computed here reach the training."""
    with ExitStack() as stack:
        stack.enter_context(isolated_step(trainer, pl_module))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Sharded parameters cannot be replaced; without gradients of their own they need not be.
        if sharing(trainer) != "shards":
            stack.enter_context(_copies(pl_module, float32))
        stack.enter_context(torch.enable_grad())
        yield


def _loss(trainer: Trainer, pl_module: LightningModule, taken: _Taken, float32: bool) -> Tensor:
    """The loss of one batch as it goes into backward: its share of the window, scaled."""
    restore_rng(taken.rng)
    batch = cast(taken.batch, torch.float32) if float32 and is_half(trainer) else taken.batch
    build = trainer.fit_loop.epoch_loop._build_kwargs
    arguments = build(OrderedDict(), batch, taken.batch_idx).values()
    device = trainer.strategy.root_device.type
    context = torch.autocast(device, enabled=False)
    with context if float32 else trainer.precision_plugin.train_step_context():
        output = _eager_step(pl_module)(*arguments)
    loss = output.get("loss") if isinstance(output, dict) else output
    assert isinstance(loss, Tensor), "a step without a loss is not measured either"
    scaler = None if float32 else loss_scaler(trainer)
    share = loss / trainer.accumulate_grad_batches
    return share if scaler is None else scaler.scale(share)


def _eager_step(pl_module: LightningModule) -> Callable[..., Any]:
    compiled = getattr(pl_module, "_compiler_ctx", None)
    return compiled["original_training_step"] if compiled else pl_module.training_step


@contextmanager
def _copies(pl_module: LightningModule, float32: bool) -> Iterator[None]:
    """Other parameters and buffers in the module's place: no gradient reaches its own.

    They share the module's memory, but for half-precision ones that are to be float32.
    """
    homes: list[tuple[dict[str, Any], str, Tensor]] = [
        (table, key, value)
        for module in pl_module.modules()
        for table in (module._parameters, module._buffers)
        for key, value in table.items()
        if value is not None
    ]
    copies = {id(value): _copy(value, float32) for _, _, value in homes}
    try:
        for table, key, value in homes:
            table[key] = copies[id(value)]
        _relist(pl_module)
        yield
    finally:
        for table, key, value in homes:
            table[key] = value
        _relist(pl_module)


def _relist(pl_module: LightningModule) -> None:
    """Recurrent modules keep a list of their weights."""
    for module in pl_module.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


def _copy(value: Tensor, float32: bool) -> Tensor:
    data = value.detach()
    data = data.float() if float32 and data.dtype in HALF else data
    if isinstance(value, nn.Parameter):
        return nn.Parameter(data, requires_grad=value.requires_grad)
    return data.clone()
