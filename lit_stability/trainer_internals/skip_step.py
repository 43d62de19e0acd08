"""Skips optimizer steps without changing optimizer, schedulers, loggers or counters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lit_stability.lightning_package import Trainer
from lit_stability.trainer_internals.loop_counters import step_counters
from lit_stability.trainer_internals.strategies import adapter_of
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

_PAUSED = "rejected"
"""Interval of a paused scheduler; Lightning steps only those of "step" and "epoch"."""


class StepSkipper:
    """Skips the optimizer steps of one accumulation window.

    Args:
        trainer: in its fit.
        pause: pauses schedulers and loggers meanwhile.
    """

    def __init__(self, trainer: Trainer, pause: SchedulerPause) -> None:
        self._trainer, self._pause = trainer, pause
        self._counts: list[tuple[Optimizer, dict[Tensor, dict[str, Any]]]] = []
        self._scaler_state: dict[str, Any] | None = None
        self._strategy_counts: Any = None

    @property
    def active(self) -> bool:
        """Whether a step was skipped in this window."""
        return bool(self._counts)

    def skips(self, optimizer: Optimizer) -> bool:
        """Returns whether the step of an optimizer is skipped in this window."""
        return any(skipped is optimizer for skipped, _ in self._counts)

    def skip(self, optimizer: Optimizer, *, epoch: bool, counted: bool = True) -> None:
        """Skips the next step of an optimizer.

        Args:
            optimizer: in ``on_before_optimizer_step``.
            epoch: pause the schedulers of interval "epoch" too.
            counted: whether Lightning will count the step; not if it will never be taken.
        """
        remove_gradients(optimizer)
        if self.skips(optimizer):
            return
        if not self.active:
            # The loss scaler will count the skipped step; restore() resets it.
            self._scaler_state = copy.deepcopy(self._trainer.precision_plugin.state_dict())
            self._strategy_counts = adapter_of(self._trainer).counts()
            self._pause.begin(self._trainer, epoch=epoch)
        self._counts.append((optimizer, _counts(optimizer)))
        if counted:
            _uncount_step(self._trainer)

    def restore(self) -> None:
        """Restores the loss scaler, and optimizer counters that change even without gradients."""
        if self.active:
            adapter_of(self._trainer).load_counts(self._strategy_counts)
        if self._scaler_state:
            self._trainer.precision_plugin.load_state_dict(self._scaler_state)
        for optimizer, counts in self._counts:
            for parameter, values in counts.items():
                optimizer.state[parameter].update(values)

    def forget(self) -> None:
        """Clears the skipped steps, at the start of another window."""
        self._counts, self._scaler_state = [], None


def parameters_of(optimizer: Optimizer) -> Sequence[Tensor]:
    """Returns all parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def remove_gradients(optimizer: Optimizer) -> None:
    """Skips the next step of an optimizer: without gradients it changes nothing.

    Zero gradients would not do: AdamW would decay the weights, and moments would change. Hooks that
    run before the step see zeros nevertheless, see `lit_stability.training_state.skipped_step`.
    """
    for parameter in parameters_of(optimizer):
        parameter.grad = None


def _counts(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Returns the optimizer state that is not a tensor, such as the evaluations of LBFGS."""
    return {
        parameter: {k: v for k, v in state.items() if isinstance(v, int | float)}
        for parameter, state in optimizer.state.items()
    }


def _groups(optimizer: Optimizer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns each group with a copy of its options and the nominal learning rate."""
    saved = []
    rates = learning_rate_multiplier(optimizer).nominal()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        lr = options["lr"]
        options["lr"] = lr.fill_(rate) if isinstance(lr, Tensor) else rate
        saved.append((group, options))
    return saved


def _uncount_step(trainer: Trainer) -> None:
    """Subtracts a skipped step from the counters in advance: Lightning will count it."""
    automatic, manual, _ = step_counters(trainer)
    counter = automatic if trainer.lightning_module.automatic_optimization else manual
    for tracker in (counter.total, counter.current):
        tracker.ready -= 1
        tracker.completed -= 1


@dataclass
class SchedulerPause:
    """Pauses learning-rate schedulers and loggers on a rejected step.

    The pause lasts from the skipped step to the next fetch or the end of the epoch, because
    schedulers that follow a metric are stepped after the end of the batch. In manual optimization
    the module steps its schedulers, so their state is restored at the end of the batch.
    """

    _intervals: list[tuple[Any, str]] = field(default_factory=list, init=False)
    _states: list[tuple[Any, Any]] = field(default_factory=list, init=False)
    _groups: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list, init=False)
    _hidden: list[tuple[Any, bool]] = field(default_factory=list, init=False)

    def begin(self, trainer: Trainer, *, epoch: bool) -> None:
        """Starts the pause.

        Args:
            trainer: owner of the schedulers.
            epoch: pause those of interval "epoch" too, as the epoch will not end with this batch.
        """
        configs = trainer.strategy.lr_scheduler_configs
        for config in configs:
            if config.interval == "step" or (epoch and config.interval == "epoch"):
                self._intervals.append((config, config.interval))
                config.interval = _PAUSED
        if trainer.lightning_module.automatic_optimization or self._states:
            return
        self._states = [(c.scheduler, copy.deepcopy(c.scheduler.state_dict())) for c in configs]
        self._groups = [saved for optimizer in trainer.optimizers for saved in _groups(optimizer)]

    def undo(self) -> None:
        """Restores the schedulers that the module has stepped, in manual optimization."""
        for scheduler, state in self._states:
            scheduler.load_state_dict(state)
        for group, saved in self._groups:
            group.update(saved)
        self.forget()

    def forget(self) -> None:
        """Drops the saved states: a snapshot restores the schedulers instead."""
        self._states, self._groups = [], []

    def hide(self, trainer: Trainer, *, same_step: bool) -> None:
        """Prevents logging of a rejected batch; called at its end.

        Args:
            trainer: in its fit.
            same_step: whether the next batch is logged at the same step as this one.
        """
        loop = trainer.fit_loop.epoch_loop
        for metric in loop._results.values():
            self._hidden.append((metric, metric.has_reset))
            metric.has_reset = True
        if same_step and not loop._should_accumulate():
            loop._batches_that_stepped -= 1

    def end(self) -> None:
        """Ends the pause, before the next fetch or at the end of the epoch."""
        for config, interval in self._intervals:
            config.interval = interval
        for metric, has_reset in self._hidden:
            metric.has_reset = has_reset
        self._intervals, self._hidden = [], []

    def release_epoch(self) -> None:
        """Releases only the schedulers of interval "epoch": the epoch ends with this batch."""
        for config, interval in self._intervals:
            if interval == "epoch":
                config.interval = interval
