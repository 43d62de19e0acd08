"""What the checks look at: a copy of the model, and how to run it on a batch.

Everything is done to copies: a check may write into weights, buffers, gradients, modes and
attributes without the model that is going to train ever knowing. Only the random generators are
shared, and `rehearsing` puts them back. May import torch; knows no Lightning.
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
"""Gives the loss, 0-d, of a model on a batch."""


class StepError(Exception):
    """A step that cannot be taken; it carries the finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


@dataclass
class Subject:
    """A model before its first step.

    Args:
        original: the model that will train; read, never run.
        step: runs a model on a batch and returns the loss.
        batch: the first batch; every run is given a copy of it.
        optimizers: of the original; read, never stepped.
        schedulers: of those optimizers, stepped once per step; read, never stepped.
        clip: clips the gradients of a model for an optimizer, as training will.
        context: what a step runs under, such as autocast.
        scale: factor on the loss before the backward pass, for fp16 gradients; divided out again.
        steps: optimizer steps that are planned; infinite where nobody knows.
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
        """A new copy, with its modes; gradients are not copied."""
        model, _ = self._copy()
        return model

    def model_and_optimizers(self) -> tuple[nn.Module, list[Optimizer]]:
        """A new copy, and copies of the optimizers that step it."""
        model, memo = self._copy()
        return model, [copy.deepcopy(each, memo) for each in self.optimizers]

    def _copy(self) -> tuple[nn.Module, dict[int, Any]]:
        memo: dict[int, Any] = {id(each): each for each in self.shared}
        try:
            model = copy.deepcopy(self.original, memo)
        except Exception as error:  # locks, files, tensors of a graph: whatever a module may hold
            raise NotApplicableError(f"the model cannot be copied: {error!r}") from error
        return model, memo

    def loss(self, model: nn.Module, batch: Any = None, seed: int | None = None) -> Tensor:
        """Run a model on a copy of the batch, always under the same random numbers.

        Args:
            model: a copy made by this subject.
            batch: another batch than the first.
            seed: other random numbers than those of the first step.

        Raises:
            StepError: the step raises, or gives no loss.
            NotApplicableError: there is no memory for it, or the batch cannot be copied.
        """
        restore_rng(self._rng)
        if seed is not None:
            torch.manual_seed(seed)
        batch = self._own(self.batch if batch is None else batch)
        try:
            with self.context():
                loss = self.step(model, batch)
        except (StepError, NotApplicableError):
            raise
        except torch.OutOfMemoryError as error:  # training has no copies beside it
            raise NotApplicableError(
                f"there is no memory for a copy of the model: {error}"
            ) from error
        except Exception as error:  # whatever the user's code raises is what there is to tell
            raise StepError(_raised(error)) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise StepError(_no_loss(loss))
        return loss.reshape(())

    @staticmethod
    def _own(batch: Any) -> Any:
        try:
            return copy.deepcopy(batch)
        except Exception as error:  # whatever a batch may hold
            raise NotApplicableError(f"the batch cannot be copied: {error!r}") from error

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """Leave the gradients of a loss in a model, unscaled.

        Raises:
            StepError: there is nothing to differentiate.
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
    """Put generators and warnings back as they were; compiled modules run as they are written."""
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
    """The first floating tensor of what a module is given or returns, or None."""
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else None
    parts = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (Mapping, list, tuple)):
        return None
    return next((found for each in parts if (found := first_tensor(each)) is not None), None)


def _raised(error: Exception) -> Finding:
    return Finding(
        check="step",
        severity="error",
        what=f"the step raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        why="training will raise it too",
        remedy="run the step on one batch by hand, and mend it",
    )


def _no_loss(loss: Any) -> Finding:
    got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    return Finding(
        check="step",
        severity="error",
        what=f"the step returns no scalar loss, got {got}",
        why="there is nothing to minimise",
        remedy="return a tensor of one element, or a dict that has it under 'loss'",
    )


def _detached() -> Finding:
    return Finding(
        check="step",
        severity="error",
        what="the loss depends on no trainable parameter",
        why="its backward pass raises, or moves nothing",
        remedy="look for detach(), .item(), no_grad() on the way to the loss, and for frozen "
        "modules",
    )
