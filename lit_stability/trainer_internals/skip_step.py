"""Vetoing a step that an optimizer is about to take, without a trace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.trainer_internals.loop_counters import step_counters
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

_PAUSED = "rejected"
"""Interval of a scheduler that is on hold; Lightning moves only those of "step" and "epoch"."""


class StepSkipper:
    """The veto on the optimizer steps of one window.

    Args:
        trainer: in its fit.
        pause: holds schedulers and loggers meanwhile.
    """

    def __init__(self, trainer: Trainer, pause: SchedulerPause) -> None:
        self._trainer, self._pause = trainer, pause
        self._counts: list[tuple[Optimizer, dict[Tensor, dict[str, Any]]]] = []
        self._scaler_state: dict[str, Any] | None = None

    @property
    def active(self) -> bool:
        """Whether an optimizer was kept from its step."""
        return bool(self._counts)

    def skip(self, optimizer: Optimizer, *, epoch: bool) -> None:
        """Keep an optimizer from moving anything at the step it is about to take.

        Args:
            optimizer: in ``on_before_optimizer_step``.
            epoch: hold the schedulers of interval "epoch" too.
        """
        remove_gradients(optimizer)
        if any(skipped is optimizer for skipped, _ in self._counts):
            return
        if not self.active:
            # The loss scaler is about to count a step that never was.
            self._scaler_state = copy.deepcopy(self._trainer.precision_plugin.state_dict())
            self._pause.begin(self._trainer, epoch=epoch)
        self._counts.append((optimizer, _counts(optimizer)))
        _uncount_step(self._trainer)

    def restore(self) -> None:
        """Put back what counts the steps even where there is no gradient."""
        if self._scaler_state:
            self._trainer.precision_plugin.load_state_dict(self._scaler_state)
        for optimizer, counts in self._counts:
            for parameter, values in counts.items():
                optimizer.state[parameter].update(values)

    def forget(self) -> None:
        """Another window begins."""
        self._counts, self._scaler_state = [], None


def parameters_of(optimizer: Optimizer) -> Sequence[Tensor]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def remove_gradients(optimizer: Optimizer) -> None:
    """Skips the step that an optimizer is about to take: it changes nothing without gradients.

    With gradients of zero it would: AdamW decays weights, and moments change.
    """
    for parameter in parameters_of(optimizer):
        parameter.grad = None


def is_skipped(optimizer: Optimizer) -> bool:
    """Returns whether the step that an optimizer is about to take was skipped.

    To be asked in ``on_before_optimizer_step``, after the callbacks that may skip it.
    """
    return all(parameter.grad is None for parameter in parameters_of(optimizer))


def _counts(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """State that is no tensor, such as the evaluations that LBFGS counts."""
    return {
        parameter: {k: v for k, v in state.items() if isinstance(v, int | float)}
        for parameter, state in optimizer.state.items()
    }


def _groups(optimizer: Optimizer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each group, and a copy of its options: inside a step, with the rate that is not scaled."""
    saved = []
    rates = learning_rate_multiplier(optimizer).nominal()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        lr = options["lr"]
        options["lr"] = lr.fill_(rate) if isinstance(lr, Tensor) else rate
        saved.append((group, options))
    return saved


def _uncount_step(trainer: Trainer) -> None:
    """Take a vetoed step off the count while it is being taken: Lightning is about to count it."""
    automatic, manual, _ = step_counters(trainer)
    counter = automatic if trainer.lightning_module.automatic_optimization else manual
    for tracker in (counter.total, counter.current):
        tracker.ready -= 1
        tracker.completed -= 1


@dataclass
class SchedulerPause:
    """Keeps learning-rate schedulers, and the loggers, from moving on a rejected step.

    Holds from the veto to the next fetch, or to the end of the epoch: schedulers that follow a
    metric are stepped after the end of the batch. In manual optimization, where the module steps
    them, their state is put back at the end of the batch.
    """

    _intervals: list[tuple[Any, str]] = field(default_factory=list, init=False)
    _states: list[tuple[Any, Any]] = field(default_factory=list, init=False)
    _groups: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list, init=False)
    _shown: list[tuple[Any, bool]] = field(default_factory=list, init=False)

    def begin(self, trainer: Trainer, *, epoch: bool) -> None:
        """From the veto on.

        Args:
            trainer: whose schedulers to hold.
            epoch: hold those of interval "epoch" too, as the epoch will not end with this batch.
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
        """Put back what the module did to schedulers since the veto, in manual optimization."""
        for scheduler, state in self._states:
            scheduler.load_state_dict(state)
        for group, saved in self._groups:
            group.update(saved)
        self.forget()

    def forget(self) -> None:
        """A snapshot is put back, which has the schedulers' state."""
        self._states, self._groups = [], []

    def hide(self, trainer: Trainer, *, same_step: bool) -> None:
        """At the end of a rejected batch: nothing is logged for it.

        Args:
            trainer: as before.
            same_step: whether the next batch is to be logged at the step of this one.
        """
        loop = trainer.fit_loop.epoch_loop
        for metric in loop._results.values():
            self._shown.append((metric, metric.has_reset))
            metric.has_reset = True
        if same_step and not loop._should_accumulate():
            loop._batches_that_stepped -= 1

    def end(self) -> None:
        """Before the next batch is fetched, or at the end of the epoch."""
        for config, interval in self._intervals:
            config.interval = interval
        for metric, has_reset in self._shown:
            metric.has_reset = has_reset
        self._intervals, self._shown = [], []

    def release_epoch(self) -> None:
        """Let go of the schedulers of interval "epoch" alone: the epoch ends after all."""
        for config, interval in self._intervals:
            if interval == "epoch":
                config.interval = interval
