"""Copies a model for the checks, and runs the copy on a batch.

All checks run on copies, so they may write to weights, buffers, gradients, modes and attributes
without any effect on the model that will be trained. Only the random generators are shared;
`rehearsing` restores them. May import torch; does not import Lightning.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.report import NotApplicableError
from lit_stability.training_state.rng import capture_rng, restore_rng

Step = Callable[[nn.Module, Any], Tensor]
"""Returns the loss of a model on a batch, a tensor with one element."""


class StepError(Exception):
    """Raised if a training step fails; `finding` contains the reason."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


@dataclass
class Subject:
    """The model to check, with everything that its first training step needs.

    Args:
        original: The model that will be trained; it is read, but never run.
        step: Runs a model on a batch and returns the loss.
        batch: The first batch; each run receives a copy.
        optimizers: Of the original; read, never stepped.
        schedulers: Of these optimizers, with one step per optimizer step; read, never stepped.
        clip: Clips the gradients of a model for an optimizer, as training will.
        context: Context manager that a step runs in, such as autocast.
        scale: Factor on the loss before the backward pass, for fp16 gradients; gradients are
            divided by it afterwards.
        steps: Number of planned optimizer steps; infinite if it is unknown.
    """

    original: nn.Module
    step: Step
    batch: Any
    optimizers: Sequence[Optimizer] = ()
    schedulers: Sequence[Any] = ()
    clip: Callable[[nn.Module, Optimizer], None] | None = None
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    scale: float = 1.0
    steps: float = math.inf
    shared: Sequence[Any] = ()
    """Objects that a copy of the model shares with the original, such as its trainer."""
    _rng: dict[str, Any] = field(default_factory=capture_rng, repr=False)

    def model(self) -> nn.Module:
        """Returns a new copy of the model in the same train and eval modes, without gradients."""
        model, _ = self._copy()
        return model

    def model_and_optimizers(self) -> tuple[nn.Module, list[Optimizer]]:
        """Returns a new copy of the model, and copies of the optimizers that update this copy."""
        model, memo = self._copy()
        return model, [copy.deepcopy(optimizer, memo) for optimizer in self.optimizers]

    def _copy(self) -> tuple[nn.Module, dict[int, Any]]:
        memo: dict[int, Any] = {id(shared): shared for shared in self.shared}
        try:
            model = copy.deepcopy(self.original, memo)
        except Exception as error:  # a module may hold anything: locks, files, non-leaf tensors
            raise NotApplicableError(f"the model cannot be copied: {error!r}") from error
        return model, memo

    def loss(self, model: nn.Module, batch: Any = None, seed: int | None = None) -> Tensor:
        """Runs a model on a copy of the batch, always with the same random numbers.

        Args:
            model: A copy made by this subject.
            batch: Replaces the first batch.
            seed: Replaces the random state of the first step.

        Returns:
            The loss, 0-d.

        Raises:
            StepError: If the step raises an error, or returns no scalar loss.
            NotApplicableError: If memory runs out, or the batch cannot be copied.
        """
        restore_rng(self._rng)
        if seed is not None:
            torch.manual_seed(seed)
        batch = self._copy_batch(self.batch if batch is None else batch)
        try:
            with self.context():
                loss = self.step(model, batch)
        except (StepError, NotApplicableError):
            raise
        except torch.OutOfMemoryError as error:  # training itself needs no copy of the model
            raise NotApplicableError(
                f"there is no memory for a copy of the model: {error}"
            ) from error
        except Exception as error:  # user code may raise anything
            raise StepError(_step_raises(error)) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise StepError(_no_loss(loss))
        return loss.reshape(())

    @staticmethod
    def _copy_batch(batch: Any) -> Any:
        try:
            return copy.deepcopy(batch)
        except Exception as error:  # a batch may hold anything
            raise NotApplicableError(f"the batch cannot be copied: {error!r}") from error

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Runs the backward pass of a loss; the gradients in the model are unscaled.

        Raises:
            StepError: If the loss does not require a gradient.
        """
        if not loss.requires_grad:
            raise StepError(_detached())
        (loss * self.scale).backward()  # type: ignore[no-untyped-call]
        if self.scale != 1.0:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Restores random generators and warning filters on exit; runs compiled modules eagerly."""
    rng = capture_rng()
    try:
        with (
            warnings.catch_warnings(),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        restore_rng(rng)


def first_tensor(value: Any) -> Tensor | None:
    """Returns the first floating-point tensor in a module's inputs or outputs, or None."""
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else None
    parts = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (Mapping, list, tuple)):
        return None
    return next((tensor for part in parts if (tensor := first_tensor(part)) is not None), None)


def _step_raises(error: Exception) -> Finding:
    return Finding(
        check="step",
        severity="error",
        what=f"the step raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        why="training will fail with the same error",
        remedy="run the step on a single batch and fix the error",
    )


def _no_loss(loss: Any) -> Finding:
    got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    return Finding(
        check="step",
        severity="error",
        what=f"the step returns no scalar loss, got {got}",
        why="the optimizer has nothing to minimise",
        remedy="return a tensor with one element, or a dict with that tensor under 'loss'",
    )


def _detached() -> Finding:
    return Finding(
        check="step",
        severity="error",
        what="the loss depends on no trainable parameter",
        why="the backward pass fails, or the step updates no weight",
        remedy="look for detach(), .item(), no_grad() on the way to the loss, and for frozen "
        "modules",
    )
