"""Everything that reaches inside Lightning's Trainer, in one room.

Each private attribute relied on is listed in `PRIVATE`, with the versions it was run on; a test
fails loudly when one of them moves.
"""

from lit_stability.trainer_state.metrics import LoggedMetrics
from lit_stability.trainer_state.progress import (
    Progress,
    SchedulerPause,
    capture_progress,
    restore_progress,
    uncount_step,
)
from lit_stability.trainer_state.snapshot import TrainingSnapshot
from lit_stability.trainer_state.view import (
    callbacks_of,
    log_every,
    logger_step,
    loss_scaler,
    run_directory,
    unscale,
)

LIGHTNING_VERSIONS = ("2.6.0", "2.6.6")
"""Oldest and newest version of lightning that the tests were run on."""

PRIVATE = (
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._results",
    "fit_loop.epoch_loop.automatic_optimization.optim_progress",
    "fit_loop.epoch_loop.manual_optimization.optim_step_progress",
    "fit_loop.epoch_loop.scheduler_progress",
    "strategy.lr_scheduler_configs",
)
"""Paths below a Trainer that are not public API and that this package reads or writes."""

__all__ = [
    "LIGHTNING_VERSIONS",
    "PRIVATE",
    "LoggedMetrics",
    "Progress",
    "SchedulerPause",
    "TrainingSnapshot",
    "callbacks_of",
    "capture_progress",
    "log_every",
    "logger_step",
    "loss_scaler",
    "restore_progress",
    "run_directory",
    "uncount_step",
    "unscale",
]
