"""Where a Trainer's loops stand: counters, and what was logged last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

_LOGGED = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


class LoopState:
    """All counters of the fit loop as they are between two batches.

    ``_batches_that_stepped``, the step that loggers are given, is left out: it never goes back.

    Args:
        trainer: to read, before a batch is fetched.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._counters = [(each, dict(vars(each))) for each in _counters(trainer)]
        self._should_stop = trainer.should_stop
        self._accumulate = trainer.accumulate_grad_batches
        connector = trainer._logger_connector
        self._logged = {name: dict(getattr(connector, name)) for name in _LOGGED}
        self._position = (connector._first_loop_iter, connector._current_fx)
        self.epoch = trainer.current_epoch

    def restore_at_batch_end(self, trainer: Trainer, *, more: bool) -> None:
        """Rewind at the end of a rejected batch, before Lightning counts it as completed.

        Args:
            trainer: to rewind.
            more: whether the epoch has another batch to train on; without one it ends now.
        """
        self._restore(trainer)
        loop = trainer.fit_loop.epoch_loop
        for tracker in (loop.batch_progress.total, loop.batch_progress.current):
            tracker.completed -= 1
        loop.batch_progress.is_last_batch = not more
        loop._skip_next_val = more or not validates_at_end(trainer)

    def restore_at_fetch(self, trainer: Trainer) -> None:
        """Rewind between two batches, undoing what the end of the rejected one still moved."""
        self._restore(trainer)
        trainer.fit_loop.epoch_loop._skip_next_val = False
        connector = trainer._logger_connector
        connector._first_loop_iter, connector._current_fx = self._position

    def _restore(self, trainer: Trainer) -> None:
        for counter, values in self._counters:
            vars(counter).update(values)
        trainer.should_stop = self._should_stop
        trainer.accumulate_grad_batches = self._accumulate
        for name, values in self._logged.items():
            setattr(trainer._logger_connector, name, dict(values))


def _counters(trainer: Trainer) -> list[Any]:
    fit = trainer.fit_loop
    loop = fit.epoch_loop
    optimizer = loop.automatic_optimization.optim_progress.optimizer
    pairs = (
        fit.epoch_progress,
        loop.batch_progress,
        loop.scheduler_progress,
        optimizer.step,
        optimizer.zero_grad,
        loop.manual_optimization.optim_step_progress,
        loop.val_loop.batch_progress,
    )
    return [counter for pair in pairs for counter in (pair.total, pair.current)]


def validates_at_end(trainer: Trainer) -> bool:
    """Whether validation is due after the last batch of an epoch, however many it has."""
    batches: float | None = trainer.val_check_batch
    if batches is None:
        return False
    interval = trainer.val_check_interval
    return not isinstance(interval, int) or batches == trainer.num_training_batches


def count_skipped_batches(trainer: Trainer, left_out: int) -> None:
    """Count batches left out at the end of an epoch, or its validation would not be due."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if not (left_out and progress.is_last_batch and validates_at_end(trainer)):
        return
    if trainer.check_val_every_n_epoch is not None:
        current = progress.current
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + left_out)


def end_epoch_schedulers(trainer: Trainer) -> None:
    """Steps the schedulers of interval "epoch": the last batch of the epoch was skipped."""
    loop = trainer.fit_loop.epoch_loop
    loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)


@dataclass(frozen=True)
class Steps:
    """Optimizer steps counted in automatic and manual mode, and scheduler steps."""

    automatic: int
    manual: int
    scheduler: int

    @classmethod
    def of(cls, trainer: Trainer) -> Steps:
        """Read the counters."""
        return cls(*(counter.total.completed for counter in step_counters(trainer)))

    def restore(self, trainer: Trainer) -> None:
        """Rewind them at the end of a batch; ``global_step`` follows, the data do not."""
        saved = (self.automatic, self.manual, self.scheduler)
        for counter, completed in zip(step_counters(trainer), saved, strict=True):
            back = counter.total.completed - completed
            for tracker in (counter.total, counter.current):
                # Those of the epoch start at 0, also when this goes back beyond its start.
                tracker.ready = max(0, tracker.ready - back)
                tracker.completed = max(0, tracker.completed - back)


def step_counters(trainer: Trainer) -> tuple[Any, Any, Any]:
    """Of optimizer steps in automatic and manual optimization, and of scheduler steps."""
    loop = trainer.fit_loop.epoch_loop
    return (
        loop.automatic_optimization.optim_progress.optimizer.step,
        loop.manual_optimization.optim_step_progress,
        loop.scheduler_progress,
    )
