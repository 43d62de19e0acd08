"""Faults to rehearse with: what breaks real runs, one line each.

    FaultInjector([NanLoss(step=150), CorruptWeight(step=200, parameter="decoder.*", bit=30)])

Each fault strikes once, when ``global_step`` reaches its step; a rollback that rewinds the count
does not bring it back. Of a sharded weight each rank spoils its own shard.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.tensor_tree import tensors_in


@dataclass(kw_only=True)
class Fault:
    """Something that goes wrong at a step.

    Raises:
        ValueError: if an option is out of its range.
    """

    step: int
    """``global_step`` from which on it strikes."""
    steps: int = 1
    """Batches it strikes, one after the other."""
    rank: int | None = None
    """The only rank it strikes, None for all."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step must be 0 or more, got {self.step!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps!r}")
        self.injected = 0

    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Called before the training step."""

    def on_loss(self, loss: Tensor) -> Tensor:
        """Called with the loss; returns what is trained on."""
        return loss

    def on_gradients(self, pl_module: LightningModule) -> None:
        """Called after backward."""


@dataclass(kw_only=True)
class NanLoss(Fault):
    """The loss is NaN, and so is every gradient."""

    def on_loss(self, loss: Tensor) -> Tensor:
        """See `Fault`."""
        return loss * math.nan


@dataclass(kw_only=True)
class ScaleLoss(Fault):
    """A loss spike: the loss and its gradients are this much too large."""

    factor: float = 1e4

    def on_loss(self, loss: Tensor) -> Tensor:
        """See `Fault`."""
        return loss * self.factor


@dataclass(kw_only=True)
class CorruptGradient(Fault):
    """One element of each matching gradient becomes NaN, Inf or any other value."""

    parameter: str = "*"
    value: float = math.nan

    def on_gradients(self, pl_module: LightningModule) -> None:
        """See `Fault`."""
        for _, p in _matching(pl_module, self.parameter):
            if p.grad is not None:
                local(p.grad).view(-1)[:1] = self.value


@dataclass(kw_only=True)
class ScaleGradients(Fault):
    """Matching gradients are this much too large."""

    parameter: str = "*"
    factor: float = 1e3

    def on_gradients(self, pl_module: LightningModule) -> None:
        """See `Fault`."""
        for _, p in _matching(pl_module, self.parameter):
            if p.grad is not None:
                local(p.grad).mul_(self.factor)


@dataclass(kw_only=True)
class CorruptWeight(Fault):
    """One element of each matching weight becomes ``value``, or has a bit flipped."""

    parameter: str = "*"
    value: float = math.nan
    bit: int | None = None
    """Bit of the fp32 pattern to flip instead, 0 to 31 (sign); 30 is the exponent's highest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bit is not None and not 0 <= self.bit <= 31:
            raise ValueError(f"bit must be in 0..31, got {self.bit!r}")

    @torch.no_grad()
    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """See `Fault`."""
        for _, p in _matching(pl_module, self.parameter):
            flat = local(p.data).view(-1)
            if self.bit is None:
                flat[:1] = self.value
            else:
                # 1 << 31 is beyond int32; its two's complement has the same bits.
                mask = (1 << self.bit) - (1 << 32 if self.bit == 31 else 0)
                flat[:1] = (flat[:1].float().view(torch.int32) ^ mask).view(torch.float32)


@dataclass(kw_only=True)
class CorruptMoment(Fault):
    """Matching optimizer state is overwritten, as by a bad resume or a broken kernel."""

    parameter: str = "*"
    key: str = "exp_avg_sq"
    value: float = 0.0

    @torch.no_grad()
    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """See `Fault`."""
        for optimizer in trainer.optimizers:
            for _, p in _matching(pl_module, self.parameter):
                state = optimizer.state.get(p) or {}
                if self.key in state:
                    local(state[self.key]).fill_(self.value)


@dataclass(kw_only=True)
class JumpLearningRate(Fault):
    """The learning rate is this much too large from the step on, whatever writes it."""

    factor: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = 2**62
        self._written: dict[int, float] = {}

    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """See `Fault`."""
        for i, group in enumerate(g for o in trainer.optimizers for g in o.param_groups):
            rate = float(group["lr"])
            # A scheduler that works from the last value carries the jump along by itself.
            if rate < 0.5 * self._written.get(i, math.inf):
                group["lr"] = rate * self.factor
                self._written[i] = rate * self.factor


@dataclass(kw_only=True)
class BadBatch(Fault):
    """Floating-point tensors of the batch become ``value``; without one, integers are shuffled."""

    value: float = math.nan

    @torch.no_grad()
    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """See `Fault`."""
        tensors = list(tensors_in(batch))
        floating = [t for t in tensors if t.is_floating_point()]
        for t in floating:
            t.fill_(self.value)
        if not floating:
            generator = torch.Generator().manual_seed(self.step)
            for t in tensors:
                order = torch.randperm(t.numel(), generator=generator).to(t.device)
                t.copy_(t.reshape(-1)[order].view_as(t))


class FaultInjector(Callback):
    """Makes faults happen in an otherwise healthy run.

    Args:
        faults: what goes wrong, and when.

    Raises:
        ValueError: if there is nothing to inject.
    """

    def __init__(self, faults: list[Fault]) -> None:
        if not faults:
            raise ValueError("faults is empty: give at least one fault, or leave the injector out")
        self.faults = list(faults)
        self._active: list[Fault] = []
        self._undo: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the injector between the module and its loss."""
        self.module = pl_module
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._spoil(original(*args, **kwargs))

        pl_module.training_step = training_step  # type: ignore[method-assign]
        self._undo = functools.partial(vars(pl_module).pop, "training_step", None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the faults of this batch."""
        self._active = [f for f in self.faults if self._is_due(f, trainer)]
        for fault in self._active:
            fault.injected += 1
            fault.on_batch(trainer, pl_module, batch)

    @staticmethod
    def _is_due(fault: Fault, trainer: Trainer) -> bool:
        here = fault.rank is None or fault.rank == trainer.global_rank
        # Once begun it goes on through vetoed steps, which do not count.
        due = trainer.global_step >= fault.step or fault.injected > 0
        return here and due and fault.injected < fault.steps

    def _spoil(self, output: Any) -> Any:
        for fault in self._active:
            if isinstance(output, Tensor):
                output = fault.on_loss(output)
            elif isinstance(output, dict) and "loss" in output:
                output = {**output, "loss": fault.on_loss(output["loss"])}
        return output

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spoil the gradients."""
        for fault in self._active:
            fault.on_gradients(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._undo is not None:
            self._undo()
            self._undo = None


def _matching(module: nn.Module, pattern: str) -> Sequence[tuple[str, nn.Parameter]]:
    found = [(n, p) for n, p in module.named_parameters() if fnmatchcase(n, pattern)]
    if not found:
        names = [n for n, _ in module.named_parameters()]
        raise ValueError(f"no parameter matches {pattern!r}; there are {names[:10]}")
    return found
