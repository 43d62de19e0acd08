"""Fault injection for tests: the failures of real runs, one line each.

    FaultInjector([NanLoss(step=150), CorruptWeight(step=200, parameter="decoder.*", bit=30)])

Each fault is injected once, when ``global_step`` reaches its step; a rollback that resets
``global_step`` does not trigger it again. Of a sharded weight, each rank corrupts its own shard.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local
from lit_stability.lightning_package import Callback, LightningModule, Trainer
from lit_stability.measurement.bit_patterns import words
from lit_stability.measurement.tensor_tree import tensors_in
from lit_stability.trainer_internals import adapter_of


@dataclass(kw_only=True)
class Fault:
    """Base class of faults that are injected at a given step.

    Raises:
        ValueError: if an option is out of range.
    """

    step: int
    """``global_step`` from which on the fault is injected."""
    steps: int = 1
    """Number of consecutive batches it affects."""
    rank: int | None = None
    """The only rank it affects, None for all."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step must be 0 or more, got {self.step!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps!r}")
        self.injected = 0

    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Called before the training step; may change the batch, weights or optimizer state."""

    def on_loss(self, loss: Tensor) -> Tensor:
        """Called with the loss; returns the loss to train on."""
        return loss

    def on_gradients(self, pl_module: LightningModule) -> None:
        """Called after backward; may change the gradients."""


@dataclass(kw_only=True)
class NanLoss(Fault):
    """Makes the loss NaN, and with it every gradient."""

    def on_loss(self, loss: Tensor) -> Tensor:
        """See `Fault`."""
        return loss * math.nan


@dataclass(kw_only=True)
class ScaleLoss(Fault):
    """Causes a loss spike: multiplies the loss, and with it its gradients, by ``factor``."""

    factor: float = 1e4

    def on_loss(self, loss: Tensor) -> Tensor:
        """See `Fault`."""
        return loss * self.factor


@dataclass(kw_only=True)
class CorruptGradient(Fault):
    """Sets one element of each matching gradient to ``value``, or flips one of its bits."""

    parameter: str = "*"
    value: float = math.nan
    bit: int | None = None
    """Bit to flip instead, of the gradient's own format; 0 is the lowest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_bit(self.bit)

    def on_gradients(self, pl_module: LightningModule) -> None:
        """See `Fault`."""
        for _, p in _matching(pl_module, self.parameter):
            if p.grad is not None:
                first = _first(local(p.grad.data))
                if self.bit is None:
                    first.fill_(self.value)
                else:
                    _flip(first, self.bit)


@dataclass(kw_only=True)
class CorruptOutput(Fault):
    """Flips one bit of the output of a module, the first time that it runs in the step.

    Raises:
        ValueError: if ``bit`` is out of range; at the step, if no module has the name.
    """

    module: str
    """Name of the module, as in ``named_modules``."""
    bit: int = 30
    """Bit to flip, of the output's own format; 0 is the lowest."""
    element: int = 0
    """Which element of the output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_bit(self.bit)

    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """See `Fault`."""
        modules = dict(pl_module.named_modules())
        if self.module not in modules:
            raise ValueError(f"no module is named {self.module!r}; there are {[*modules][:10]}")

        def flip(module: nn.Module, args: Any, output: Tensor) -> None:
            handle.remove()
            # A view of the memory: autograd must not see the write, as it does not see a fault.
            size = output.numel()
            _flip(output.data.view(-1)[self.element % size :][:1], self.bit)

        handle = modules[self.module].register_forward_hook(flip)


@dataclass(kw_only=True)
class ScaleGradients(Fault):
    """Multiplies matching gradients by ``factor``."""

    parameter: str = "*"
    factor: float = 1e3

    def on_gradients(self, pl_module: LightningModule) -> None:
        """See `Fault`."""
        for _, p in _matching(pl_module, self.parameter):
            if p.grad is not None:
                local(p.grad).mul_(self.factor)


@dataclass(kw_only=True)
class CorruptWeight(Fault):
    """Sets one element of each matching weight to ``value``, or flips one of its bits."""

    parameter: str = "*"
    value: float = math.nan
    bit: int | None = None
    """Bit of the fp32 pattern to flip instead, 0 to 31 (sign); 30 is the highest exponent bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_bit(self.bit)

    @torch.no_grad()
    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """See `Fault`."""
        for _, p in _matching(pl_module, self.parameter):
            first = _first(local(p.data))
            if self.bit is None:
                first.fill_(self.value)
            else:
                wide = first.float().clone()
                _flip(wide, self.bit)
                first.copy_(wide)


@dataclass(kw_only=True)
class CorruptMoment(Fault):
    """Overwrites matching optimizer state, as a bad resume or a broken kernel would."""

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
    """Multiplies the learning rate by ``factor`` from the step on, under any scheduler."""

    factor: float = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = 2**62
        self._written: dict[int, float] = {}

    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """See `Fault`."""
        for i, group in enumerate(g for o in trainer.optimizers for g in o.param_groups):
            rate = float(group["lr"])
            # A scheduler that computes from the last value keeps the jump by itself.
            if rate < 0.5 * self._written.get(i, math.inf):
                group["lr"] = rate * self.factor
                self._written[i] = rate * self.factor


@dataclass(kw_only=True)
class BadBatch(Fault):
    """Fills the batch's floating-point tensors with ``value``; if there are none, shuffles all."""

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
    """Injects faults into an otherwise healthy run.

    Args:
        faults: the faults, each with its step.

    Raises:
        ValueError: if ``faults`` is empty.
    """

    def __init__(self, faults: list[Fault]) -> None:
        if not faults:
            raise ValueError("faults is empty: give at least one fault, or remove FaultInjector")
        self.faults = list(faults)
        self._active: list[Fault] = []
        self._undo: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wraps the module's ``training_step``, to change its loss."""
        self.module = pl_module
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._corrupt_loss(original(*args, **kwargs))

        pl_module.training_step = training_step  # type: ignore[method-assign]
        self._undo = functools.partial(vars(pl_module).pop, "training_step", None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Selects the faults of this batch and injects those that act before the step."""
        self._active = [f for f in self.faults if self._is_due(f, trainer)]
        for fault in self._active:
            fault.injected += 1
            fault.on_batch(trainer, pl_module, batch)

    @staticmethod
    def _is_due(fault: Fault, trainer: Trainer) -> bool:
        here = fault.rank is None or fault.rank == trainer.global_rank
        # A fault that has started continues through skipped steps, which global_step ignores.
        due = trainer.global_step >= fault.step or fault.injected > 0
        return here and due and fault.injected < fault.steps

    def _corrupt_loss(self, output: Any) -> Any:
        for fault in self._active:
            if isinstance(output, Tensor):
                output = fault.on_loss(output)
            elif isinstance(output, dict) and "loss" in output:
                output = {**output, "loss": fault.on_loss(output["loss"])}
        return output

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Injects the faults that act on gradients."""
        if self._active:
            adapter_of(trainer).read_gradients()
        for fault in self._active:
            fault.on_gradients(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the module's ``training_step``."""
        if self._undo is not None:
            self._undo()
            self._undo = None


def _require_bit(bit: int | None) -> None:
    if bit is not None and not 0 <= bit <= 31:
        raise ValueError(f"bit must be in 0..31, got {bit!r}")


@torch.no_grad()
def _flip(element: Tensor, bit: int) -> None:
    """Flips a bit in the memory of one element."""
    integers = words(element)
    width = 8 * integers.element_size()
    if bit >= width:
        raise ValueError(f"bit must be in 0..{width - 1} for {element.dtype}, got {bit!r}")
    # The highest bit exceeds a signed integer; its two's complement has the same bits.
    integers ^= (1 << bit) - ((1 << width) if bit == width - 1 else 0)


def _first(tensor: Tensor) -> Tensor:
    """Returns a view of the first element, empty if there is none, in any memory format."""
    return tensor.as_strided((min(1, tensor.numel()),), (1,))


def _matching(module: nn.Module, pattern: str) -> Sequence[tuple[str, Tensor]]:
    named = list(_named(module))
    found = [(n, p) for n, p in named if fnmatchcase(n, pattern)]
    if not found:
        names = [n for n, _ in named]
        raise ValueError(f"no parameter matches {pattern!r}; there are {names[:10]}")
    return found


def _named(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    if isinstance(module, LightningModule):
        with contextlib.suppress(RuntimeError):  # it has no trainer yet
            return adapter_of(module.trainer).named_parameters(module)
    return module.named_parameters()
