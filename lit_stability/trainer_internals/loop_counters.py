"""State of a Trainer's loops: their counters and the last logged values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_stability.lightning_package import Trainer

_LOGGED = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


class LoopState:
    """All counters of the fit loop between two batches.

    ``_batches_that_stepped``, the step of the loggers, is not included: it never goes back.

    Args:
        trainer: to read, before a batch is fetched.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._counters = [(counter, dict(vars(counter))) for counter in _counters(trainer)]
        self._should_stop = trainer.should_stop
        self._accumulate = trainer.accumulate_grad_batches
        connector = trainer._logger_connector
        self._logged = {name: dict(getattr(connector, name)) for name in _LOGGED}
        self._position = (connector._first_loop_iter, connector._current_fx)
        self.epoch = trainer.current_epoch

    def restore_at_batch_end(self, trainer: Trainer, *, more: bool) -> None:
        """Rewinds at the end of a rejected batch, before Lightning counts it as completed.

        Args:
            trainer: to rewind.
            more: whether the epoch has another batch; if not, it ends now.
        """
        self._restore(trainer)
        loop = trainer.fit_loop.epoch_loop
        for tracker in (loop.batch_progress.total, loop.batch_progress.current):
            tracker.completed -= 1
        loop.batch_progress.is_last_batch = not more
        loop._skip_next_val = more or not validates_at_end(trainer)

    def restore_at_fetch(self, trainer: Trainer) -> None:
        """Rewinds again before the next fetch: the end of the rejected batch moved counters."""
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
    """Returns whether validation is due after the last batch of an epoch of any length."""
    batches: float | None = trainer.val_check_batch
    if batches is None:
        return False
    interval = trainer.val_check_interval
    return not isinstance(interval, int) or batches == trainer.num_training_batches


def count_skipped_batches(trainer: Trainer, skipped: int) -> None:
    """Counts skipped batches at the end of an epoch; without them its validation is not due.

    Where an index was moved, some of them have been counted already.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if not (skipped and progress.is_last_batch and validates_at_end(trainer)):
        return
    if trainer.check_val_every_n_epoch is not None:
        missing = trainer.num_training_batches - progress.current.ready
        _advance(trainer, int(min(skipped, max(missing, 0))))


def has_room_to_move(trainer: Trainer) -> bool:
    """Returns whether `move_batch_index` stays within the epoch.

    Args:
        trainer: at the end of a batch with an optimizer step.
    """
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready + trainer.accumulate_grad_batches <= trainer.num_training_batches


def move_batch_index(trainer: Trainer) -> None:
    """Moves the next batch to the index after its own, or by a whole accumulation window.

    Args:
        trainer: before it fetches a batch that begins a window.
    """
    _advance(trainer, trainer.accumulate_grad_batches)


def _advance(trainer: Trainer, batches: int) -> None:
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + batches)


def set_batches(trainer: Trainer, batches: int) -> None:
    """Sets the number of batches that were trained on in this epoch.

    Args:
        trainer: at the start of a resumed fit.
        batches: as many that the epoch is not over.
    """
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    _advance(trainer, batches - current.ready)


def end_epoch_schedulers(trainer: Trainer) -> None:
    """Steps the schedulers of interval "epoch": the last batch of the epoch was skipped."""
    loop = trainer.fit_loop.epoch_loop
    loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)


@dataclass(frozen=True)
class Steps:
    """Numbers of optimizer steps in automatic and manual optimization, and of scheduler steps."""

    automatic: int
    manual: int
    scheduler: int

    @classmethod
    def of(cls, trainer: Trainer) -> Steps:
        """Returns the present counts of a trainer."""
        return cls(*(counter.total.completed for counter in step_counters(trainer)))

    def restore(self, trainer: Trainer) -> None:
        """Rewinds counters and ``global_step`` at the end of a batch; data stay where they are."""
        saved = (self.automatic, self.manual, self.scheduler)
        for counter, completed in zip(step_counters(trainer), saved, strict=True):
            excess = counter.total.completed - completed
            for tracker in (counter.total, counter.current):
                # Counts of the epoch must not be negative after a rewind to an earlier epoch.
                tracker.ready = max(0, tracker.ready - excess)
                tracker.completed = max(0, tracker.completed - excess)


def step_counters(trainer: Trainer) -> tuple[Any, Any, Any]:
    """Returns the counters of automatic and manual optimizer steps, and of scheduler steps."""
    loop = trainer.fit_loop.epoch_loop
    return (
        loop.automatic_optimization.optim_progress.optimizer.step,
        loop.manual_optimization.optim_step_progress,
        loop.scheduler_progress,
    )
