"""Everything that reaches inside Lightning's Trainer, in one room.

Each private attribute relied on is listed in `PRIVATE`, with the versions it was run on; a test
fails loudly when one of them moves.
"""

from lit_stability.trainer_state.data_position import DataPosition
from lit_stability.trainer_state.metrics import EpochMetrics, LoggedMetrics
from lit_stability.trainer_state.progress import (
    Progress,
    SchedulerPause,
    capture_progress,
    restore_progress,
    uncount_step,
)
from lit_stability.trainer_state.snapshot import TrainingSnapshot
from lit_stability.trainer_state.view import (
    between_steps,
    callbacks_of,
    full_checkpoint,
    log_every,
    logger_step,
    loss_scaler,
    run_directory,
    unscale,
)
from lit_stability.trainer_state.witness import (
    StepWitness,
    incomparable,
    replay_loss,
    same_batch,
    same_loss,
)

LIGHTNING_VERSIONS = ("2.6.0", "2.6.6")
"""Oldest and newest version of lightning that the tests were run on."""

PRIVATE = (
    "_checkpoint_connector.dump_checkpoint",
    "fit_loop._combined_loader",
    "fit_loop._data_fetcher",
    "fit_loop._last_train_dl_reload_epoch",
    "fit_loop._load_combined_loader_states",
    "fit_loop._should_accumulate",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._num_ready_batches_reached",
    "fit_loop.epoch_loop._results",
    "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop.automatic_optimization.optim_progress",
    "fit_loop.epoch_loop.manual_optimization.optim_step_progress",
    "fit_loop.epoch_loop.scheduler_progress",
    "fit_loop.setup_data",
    "strategy.lr_scheduler_configs",
)
"""Paths below a Trainer that are not public API and that this package reads or writes."""

__all__ = [
    "LIGHTNING_VERSIONS",
    "PRIVATE",
    "DataPosition",
    "EpochMetrics",
    "LoggedMetrics",
    "Progress",
    "SchedulerPause",
    "StepWitness",
    "TrainingSnapshot",
    "between_steps",
    "callbacks_of",
    "capture_progress",
    "full_checkpoint",
    "incomparable",
    "log_every",
    "logger_step",
    "loss_scaler",
    "replay_loss",
    "restore_progress",
    "run_directory",
    "same_batch",
    "same_loss",
    "uncount_step",
    "unscale",
]
