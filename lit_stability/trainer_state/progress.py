"""Step counters and schedulers of a Trainer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Progress:
    """Optimizer steps counted in automatic and manual mode, and scheduler steps."""

    automatic: int
    manual: int
    scheduler: int


def _counters(trainer: Trainer) -> tuple[Any, Any, Any]:
    loop = trainer.fit_loop.epoch_loop
    return (
        loop.automatic_optimization.optim_progress.optimizer.step,
        loop.manual_optimization.optim_step_progress,
        loop.scheduler_progress,
    )


def capture_progress(trainer: Trainer) -> Progress:
    """Read the counters at the end of a batch."""
    return Progress(*(counter.total.completed for counter in _counters(trainer)))


def restore_progress(trainer: Trainer, progress: Progress) -> None:
    """Rewind the counters at the end of a batch; ``global_step`` follows them."""
    saved = (progress.automatic, progress.manual, progress.scheduler)
    for counter, completed in zip(_counters(trainer), saved, strict=True):
        _rewind(counter, counter.total.completed - completed)


def uncount_step(trainer: Trainer) -> None:
    """Take one vetoed optimizer step off the count, at the end of its batch."""
    automatic, manual, _ = _counters(trainer)
    module = trainer.lightning_module
    _rewind(automatic if module.automatic_optimization else manual, 1)


def _rewind(counter: Any, steps: int) -> None:
    for tracker in (counter.total, counter.current):
        # The counts of the epoch start at 0, also when a rollback goes back beyond its start.
        tracker.ready = max(0, tracker.ready - steps)
        tracker.completed = max(0, tracker.completed - steps)


@dataclass
class SchedulerPause:
    """Keeps learning-rate schedulers from moving on a vetoed step.

    In automatic optimization Lightning is shown a list without the step-interval schedulers until
    the end of the batch; in manual optimization, where the module steps them, their state is put
    back then.
    """

    _configs: list[Any] | None = field(default=None, init=False)
    _states: list[tuple[Any, Any]] = field(default_factory=list, init=False)
    _groups: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list, init=False)

    def begin(self, trainer: Trainer) -> None:
        """From the veto on."""
        if self._configs is not None:
            return
        self._configs = trainer.strategy.lr_scheduler_configs
        if trainer.lightning_module.automatic_optimization:
            kept = [c for c in self._configs if c.interval != "step" or c.reduce_on_plateau]
            trainer.strategy.lr_scheduler_configs = kept
            return
        self._states = [
            (c.scheduler, copy.deepcopy(c.scheduler.state_dict())) for c in self._configs
        ]
        self._groups = [
            (g, {k: copy.deepcopy(v) for k, v in g.items() if k != "params"})
            for optimizer in trainer.optimizers
            for g in optimizer.param_groups
        ]

    def end(self, trainer: Trainer) -> None:
        """At the end of the batch."""
        if self._configs is None:
            return
        trainer.strategy.lr_scheduler_configs = self._configs
        for scheduler, state in self._states:
            scheduler.load_state_dict(state)
        for group, saved in self._groups:
            group.update(saved)
        self._configs, self._states, self._groups = None, [], []
