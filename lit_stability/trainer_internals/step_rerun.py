"""Records the current optimizer step and runs it again, isolated from training.

Weights, gradients, buffers, generators and metrics are restored after each rerun.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.diagnosis.nonfinite import NonFiniteOrigin, locate_nonfinite
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.half_precision import HALF, cast
from lit_stability.measurement.norms import dense, norms_of, to_host, total
from lit_stability.measurement.tensor_tree import size_of
from lit_stability.trainer_internals.bad_samples import of_batch
from lit_stability.trainer_internals.isolation import isolated_step
from lit_stability.trainer_internals.precision import is_half
from lit_stability.trainer_internals.strategies import adapter_of
from lit_stability.trainer_internals.trainer_view import loss_scaler
from lit_stability.training_state.rng import capture_rng, restore_rng


@dataclass(frozen=True)
class Outcome:
    """Result of a step: loss, and norm of the gradients without loss scale and clipping."""

    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class _MicroBatch:
    batch: Any
    batch_idx: int
    rng: dict[str, Any]


class RecordedStep:
    """The batches of the current optimizer step, with the state of the generators before each.

    Batches are kept on the device and not copied.

    Args:
        max_bytes: bound on the size of the batches; the oldest are dropped beyond it.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self._max_bytes = max_bytes
        self._batches: list[_MicroBatch] = []

    def batch_started(self, batch: Any, batch_idx: int) -> None:
        """Records a batch before the module trains on it."""
        kept = self._batches
        kept.append(_MicroBatch(batch, batch_idx, capture_rng()))
        while len(kept) > 1 and sum(size_of(each.batch) for each in kept) > self._max_bytes:
            kept.pop(0)

    def forget(self) -> None:
        """Releases the batches, at the end of the step."""
        self._batches = []

    def obstacle(self, trainer: Trainer) -> str | None:
        """Returns why the step cannot be run again, or None."""
        if not trainer.lightning_module.automatic_optimization:
            return "in manual optimization a training_step cannot be run without its update"
        if not self._batches:
            return "its batch was not recorded"
        return adapter_of(trainer).why_no_rerun

    def rerun(self, trainer: Trainer, pl_module: LightningModule, *, float32: bool) -> Outcome:
        """Runs forward and backward pass again, in the current precision or in float32.

        Under FSDP2 all ranks must call it, as they gather weights. Under DDP a single rank may.

        Args:
            trainer: in its step, or at the end of its batch.
            pl_module: the module in training.
            float32: disables autocast and converts half-precision weights.
        """
        with _isolated(trainer, pl_module, float32):
            losses = []
            for micro_batch in self._batches:
                loss = _loss(trainer, pl_module, micro_batch, float32)
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
        """Runs the forward pass of the step again in float32, isolated from training.

        Copies replace the parameters inside the context, in the same order.

        Args:
            trainer: in its step, or at the end of its batch; sharded parameters are not supported.
            pl_module: the module in training.

        Yields:
            A function that computes each batch's share of the loss, with its graph; it may be
            called repeatedly.
        """
        with _isolated(trainer, pl_module, True):
            yield lambda: (_loss(trainer, pl_module, each, True) for each in self._batches)

    def locate(
        self, trainer: Trainer, pl_module: LightningModule, gather: Callable[[Any], list[Any]]
    ) -> NonFiniteOrigin | None:
        """Finds the operation that produced the first NaN or Inf, in the current precision.

        Under FSDP2 all ranks must call it. They search the backward pass together or not at all,
        as it exchanges gradients between ranks.

        Args:
            trainer: in its step, or at the end of its batch.
            pl_module: the module in training.
            gather: returns the values of all ranks.

        Returns:
            The origin, or None if the rerun produces no NaN or Inf.
        """
        forward_only = False
        if adapter_of(trainer).gathers_weights:
            own = self.rerun(trainer, pl_module, float32=False)
            forward_only = not all(gather(math.isfinite(own.loss)))
        origins = []
        with _isolated(trainer, pl_module, False):
            for micro_batch in self._batches:

                def step(micro_batch: _MicroBatch = micro_batch) -> Tensor:
                    loss = _loss(trainer, pl_module, micro_batch, False)
                    return loss.detach() if forward_only else loss

                origins.append(of_batch(locate_nonfinite(pl_module, step), micro_batch.batch))
        if forward_only:
            adapter_of(trainer).reshard(pl_module)
        return next((origin for origin in origins if origin is not None), None)


@contextmanager
def _isolated(trainer: Trainer, pl_module: LightningModule, float32: bool) -> Iterator[None]:
    """Isolates a rerun from training: gradients reach copies, all other state is restored."""
    with ExitStack() as stack:
        stack.enter_context(isolated_step(trainer, pl_module))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Sharded parameters cannot be replaced; isolated_step removes their gradients instead.
        if not adapter_of(trainer).gathers_weights:
            stack.enter_context(_copies(pl_module, float32))
        stack.enter_context(torch.enable_grad())
        yield


def _loss(
    trainer: Trainer, pl_module: LightningModule, micro: _MicroBatch, float32: bool
) -> Tensor:
    """Returns the loss of one batch for the backward pass: its share of the window, scaled."""
    restore_rng(micro.rng)
    batch = cast(micro.batch, torch.float32) if float32 and is_half(trainer) else micro.batch
    build = trainer.fit_loop.epoch_loop._build_kwargs
    arguments = build(OrderedDict(), batch, micro.batch_idx).values()
    device = trainer.strategy.root_device.type
    context = torch.autocast(device, enabled=False)
    with context if float32 else trainer.precision_plugin.train_step_context():
        output = adapter_of(trainer).eager_step(pl_module)(*arguments)
    loss = output.get("loss") if isinstance(output, dict) else output
    assert isinstance(loss, Tensor), "a step without a loss is not measured, so it is not run again"
    scaler = None if float32 else loss_scaler(trainer)
    share = loss / trainer.accumulate_grad_batches
    return share if scaler is None else scaler.scale(share)


def _copies(pl_module: LightningModule, float32: bool) -> AbstractContextManager[None]:
    """Replaces parameters and buffers with copies, so that no gradient reaches the originals.

    Copied parameters share memory with the originals, unless they are converted to float32.
    """
    return replaced_tensors(pl_module, lambda value: _copy(value, float32))


@contextmanager
def replaced_tensors(
    pl_module: LightningModule, replacement: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Has other tensors in the place of all parameters and buffers of a module.

    Args:
        pl_module: the module; its tensors are in their places again afterwards.
        replacement: called once with each of them; returns what takes its place.
    """
    entries: list[tuple[dict[str, Any], str, Tensor]] = [
        (table, key, value)
        for module in pl_module.modules()
        for table in (module._parameters, module._buffers)
        for key, value in table.items()
        if value is not None
    ]
    unique = {id(value): value for _, _, value in entries}
    copies = {key: replacement(value) for key, value in unique.items()}
    try:
        for table, key, value in entries:
            table[key] = copies[id(value)]
        _update_weight_lists(pl_module)
        yield
    finally:
        for table, key, value in entries:
            table[key] = value
        _update_weight_lists(pl_module)


def _update_weight_lists(pl_module: LightningModule) -> None:
    """Updates the list of weights that recurrent modules keep."""
    for module in pl_module.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]


def _copy(value: Tensor, float32: bool) -> Tensor:
    data = value.detach()
    data = data.float() if float32 and data.dtype in HALF else data
    if isinstance(value, nn.Parameter):
        return nn.Parameter(data, requires_grad=value.requires_grad)
    return data.clone()
