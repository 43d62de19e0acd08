"""Runs every ``training_step`` of a fit, and lets the fit go on where one raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from lit_stability.lightning_package import LightningModule, Trainer, is_overridden
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.step_exceptions import (
    may_come_from_numbers,
    quoted,
    raised_at,
)


@dataclass
class StepFailure:
    """A ``training_step`` that returned no usable loss; as text, as an exception keeps its tensors.

    An exception holds the frames that it was raised through, and so all activations of the step.
    """

    error: str
    """What happened, such as ``ValueError: loc is not real``."""
    place: str
    """File, line and function of the user's code; or ""."""
    batch: Any
    batches: tuple[tuple[int, int], ...] = ()
    """Epoch and index of each batch that raised in the step."""
    ranks: tuple[int, ...] = ()
    """Ranks on which it was raised; empty on one rank."""
    late: bool = False
    """Whether weights may have changed before it in the same batch."""
    findings: tuple[str, ...] = ()
    """What is wrong with the batch, one phrase each."""
    bad_batch: bool = False
    """Whether the batch holds values that explain the failure."""
    bad_weights: tuple[str, ...] = ()
    """Names of non-finite parameters."""
    bad_buffers: tuple[str, ...] = ()
    """Names of buffers that were non-finite before the step and are finite in a snapshot."""
    reported: bool = False
    """Whether an incident was raised for it."""

    @property
    def explained(self) -> bool:
        """Whether batch, weights or buffers explain the failure."""
        return self.bad_batch or bool(self.bad_weights or self.bad_buffers)


class StepGuard:
    """Stands in for ``strategy.training_step`` and catches the exceptions that numbers can cause.

    In automatic optimization a caught exception becomes a loss of 0 with gradients of 0, so that
    Lightning's loop goes on to ``on_before_optimizer_step``, where the step is rejected. In manual
    optimization ``training_step`` returns None. A loss without a graph, in a run whose losses have
    one, counts as an exception too, since Lightning's backward pass would raise one. Modes
    (``module.train()``) and ``requires_grad`` are restored, as the step may have been cut short
    between changing them and changing them back.

    Args:
        trainer: in its fit, on one rank.
        pl_module: the module in training.
        contain: called with each failure; returns whether the fit goes on. If not, the exception
            is raised as if there were no guard.
        passed: called after each ``training_step`` that worked.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        contain: Callable[[StepFailure], bool],
        passed: Callable[[], None],
    ) -> None:
        self._run: Callable[..., Any] = trainer.strategy.training_step
        self._patch = Patch(trainer.strategy, "training_step", self._guarded)
        self._trainer: Trainer | None = trainer
        self._contain, self._passed = contain, passed
        self.failure: StepFailure | None = None
        """Of the current step; None if its ``training_step`` worked."""
        self._flags = _Flags(pl_module)
        self._calls, self._failed = 0, False
        self._in_batch = self._had_graph = False
        self._patch.apply()
        _GUARDS[trainer] = self

    def remove(self) -> None:
        """Removes the guard; where another patch lies above it, it stays and does nothing."""
        if self._trainer is not None:
            _GUARDS.pop(self._trainer, None)
        self._trainer = self.failure = None
        self._patch.remove()

    def batch_started(self) -> None:
        """Records that the next call is the first one for its batch."""
        self._calls, self._failed, self._in_batch = 0, False, True

    def batch_ended(self) -> None:
        """Records that further calls, such as of a step run once more, are not for a new batch."""
        self._in_batch = False

    def _guarded(self, *args: Any, **kwargs: Any) -> Any:
        """Runs ``training_step``, with the arguments that Lightning passes."""
        trainer = self._trainer
        if trainer is None or not self._in_batch:
            return self._run(*args, **kwargs)
        if self._failed:
            # An optimizer that evaluates its closure again: the whole batch will be undone.
            return self._substitute(trainer)
        self._calls += 1
        self._flags.capture()
        return self._attempt(trainer, self._run, *args, **kwargs)

    def _attempt(
        self, trainer: Trainer, run: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what `run` returns, or a substitute where it fails and the fit goes on."""
        failure = StepFailure("", "", next(iter(args), None))
        try:
            output = run(*args, **kwargs)
        except Exception as error:
            if not self._may_be_handled(error):
                raise
            failure.error, failure.place = quoted(error), raised_at(error)
            if not self._contains(trainer, failure, error):
                raise
        else:
            if self._is_usable(trainer, output):
                self._passed()
                return output
            failure.error = "training_step returned a loss without a graph"
            if not self._contains(trainer, failure, None):
                return output
        self._flags.restore()
        return self._substitute(trainer)

    def _is_usable(self, trainer: Trainer, output: Any) -> bool:
        """Returns whether Lightning's backward pass accepts the output."""
        module = trainer.lightning_module
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not module.automatic_optimization or not isinstance(loss, Tensor):
            return True
        self._had_graph = self._had_graph or loss.requires_grad
        return loss.requires_grad or not self._had_graph or is_overridden("backward", module)

    def _may_be_handled(self, error: Exception) -> bool:
        return may_come_from_numbers(error)

    def _contains(self, trainer: Trainer, failure: StepFailure, error: Exception | None) -> bool:
        """Returns whether the fit goes on after a failure, with its exception if it has one."""
        module = trainer.lightning_module
        if not module.automatic_optimization:
            failure.late = True
            possible = not _is_inside_a_step(trainer)
        else:
            failure.late = self._calls > 1 and isinstance(trainer.optimizers[0], LBFGS)
            possible = can_substitute(module)
        if not possible or not self._contain(failure):
            return False
        self._failed = True
        # Of several in one accumulation window the first is reported.
        self.failure = self.failure or failure
        return True

    def _substitute(self, trainer: Trainer) -> Tensor | None:
        module = trainer.lightning_module
        return zero_loss(module) if module.automatic_optimization else None


class _Flags:
    """Modes of the modules and ``requires_grad`` of the parameters, before each step."""

    def __init__(self, pl_module: LightningModule) -> None:
        found = pl_module.modules()
        self._modules = [m for m in found if not isinstance(m, torch.jit.ScriptModule)]
        self._parameters = list(pl_module.parameters())
        self.capture()

    def capture(self) -> None:
        self._modes = [module.training for module in self._modules]
        self._required = [parameter.requires_grad for parameter in self._parameters]

    def restore(self) -> None:
        for module, mode in zip(self._modules, self._modes, strict=True):
            module.training = mode
        for parameter, required in zip(self._parameters, self._required, strict=True):
            parameter.requires_grad_(required)


def zero_loss(module: nn.Module) -> Tensor:
    """Returns a loss of 0 that gives each trainable parameter a gradient of 0.

    It is a sum over empty slices, which is 0 also where a parameter holds a NaN.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.bias.data.fill_(torch.nan)
    >>> loss = zero_loss(layer)
    >>> loss.backward()
    >>> loss.item(), layer.weight.grad.tolist(), layer.bias.grad.tolist()
    (0.0, [[0.0, 0.0]], [0.0])
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    empty = [(p if p.ndim else p.reshape(1))[:0].abs().sum() for p in parameters]
    return torch.stack([each.to(device, torch.float32) for each in empty]).sum()


def step_failure(trainer: Trainer) -> StepFailure | None:
    """Returns the failure of the current step that no incident was raised for, or None."""
    guard = _GUARDS.get(trainer)
    failure = None if guard is None else guard.failure
    return None if failure is None or failure.reported else failure


def can_substitute(module: LightningModule) -> bool:
    """Returns whether a loss of 0 changes no weight.

    It would where an optimizer steps inside the backward pass.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    return bool(trained) and not any(p._post_accumulate_grad_hooks for p in trained)


def _is_inside_a_step(trainer: Trainer) -> bool:
    """Returns whether ``optimizer.step(closure)`` of manual optimization is running."""
    steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    return bool(steps.ready != steps.completed)


def guard_of(trainer: Trainer) -> StepGuard:
    """Returns the guard of a trainer that has one."""
    return _GUARDS[trainer]


_GUARDS: WeakKeyDictionary[Trainer, StepGuard] = WeakKeyDictionary()
"""The guard of each trainer that has one, in its fit."""
