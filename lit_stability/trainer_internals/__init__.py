"""Everything that reaches inside Lightning's Trainer, in one room.

Each private attribute relied on is listed in `PRIVATE`, with the versions it was run on; a test
fails loudly when one of them moves.
"""

from lit_stability.trainer_internals.batch_replay import BatchRecorder, RecordedBatch, ReplayRing
from lit_stability.trainer_internals.callback_state import Stateful
from lit_stability.trainer_internals.checkpoint_ledger import CheckpointLedger
from lit_stability.trainer_internals.data_position import DataPosition
from lit_stability.trainer_internals.dataloaders import loaders
from lit_stability.trainer_internals.incident_checkpoint import save_incident_checkpoint
from lit_stability.trainer_internals.loop_counters import (
    LoopState,
    count_skipped_batches,
    end_epoch_schedulers,
)
from lit_stability.trainer_internals.metrics import EpochMetrics, LoggedMetrics
from lit_stability.trainer_internals.next_step import AroundNextStep
from lit_stability.trainer_internals.precision import (
    PrecisionSwitch,
    apply_fp32_modules,
    is_supported,
    why_fixed,
)
from lit_stability.trainer_internals.reference_step import (
    ReferenceStep,
    incomparable,
    replay_loss,
    same_batch,
    same_loss,
)
from lit_stability.trainer_internals.skip_step import (
    SchedulerPause,
    StepSkipper,
    is_skipped,
    parameters_of,
    remove_gradients,
)
from lit_stability.trainer_internals.step_rerun import Outcome, RecordedStep
from lit_stability.trainer_internals.strategies import (
    ranks_of,
    reshard,
    sharing,
    why_unsupported,
)
from lit_stability.trainer_internals.trainer_view import (
    callbacks_of,
    ends_window,
    full_checkpoint,
    log_every,
    logger_step,
    loss_scaler,
    run_directory,
    unscale,
)
from lit_stability.trainer_internals.training_snapshot import StepStart, TrainingSnapshot

LIGHTNING_VERSIONS = ("2.6.0", "2.6.6")
"""Oldest and newest version of lightning that the tests were run on."""

PRIVATE = (
    "_checkpoint_connector._get_loops_state_dict",
    "_checkpoint_connector.dump_checkpoint",
    "_logger_connector._callback_metrics",
    "_logger_connector._current_fx",
    "_logger_connector._first_loop_iter",
    "_logger_connector._logged_metrics",
    "_logger_connector._progress_bar_metrics",
    "_teardown",
    "fit_loop._combined_loader",
    "fit_loop._data_fetcher",
    "fit_loop._last_train_dl_reload_epoch",
    "fit_loop._load_combined_loader_states",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._build_kwargs",
    "fit_loop.epoch_loop._num_ready_batches_reached",
    "fit_loop.epoch_loop._results",
    "fit_loop.epoch_loop._should_accumulate",
    "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop._skip_next_val",
    "fit_loop.epoch_loop.automatic_optimization.optim_progress",
    "fit_loop.epoch_loop.batch_progress.is_last_batch",
    "fit_loop.epoch_loop.manual_optimization.optim_step_progress",
    "fit_loop.epoch_loop.scheduler_progress",
    "fit_loop.epoch_loop.val_loop.batch_progress",
    "fit_loop.epoch_progress",
    "fit_loop.setup_data",
    "lightning_module._compiler_ctx",
    "strategy._setup_model",
    "strategy.lr_scheduler_configs",
)
"""Paths below a Trainer that are not public API and that this package reads or writes."""

__all__ = [
    "LIGHTNING_VERSIONS",
    "PRIVATE",
    "AroundNextStep",
    "BatchRecorder",
    "CheckpointLedger",
    "DataPosition",
    "EpochMetrics",
    "LoggedMetrics",
    "LoopState",
    "Outcome",
    "PrecisionSwitch",
    "RecordedBatch",
    "RecordedStep",
    "ReferenceStep",
    "ReplayRing",
    "SchedulerPause",
    "Stateful",
    "StepSkipper",
    "StepStart",
    "TrainingSnapshot",
    "apply_fp32_modules",
    "callbacks_of",
    "count_skipped_batches",
    "end_epoch_schedulers",
    "ends_window",
    "full_checkpoint",
    "incomparable",
    "is_skipped",
    "is_supported",
    "loaders",
    "log_every",
    "logger_step",
    "loss_scaler",
    "parameters_of",
    "ranks_of",
    "remove_gradients",
    "replay_loss",
    "reshard",
    "run_directory",
    "same_batch",
    "same_loss",
    "save_incident_checkpoint",
    "sharing",
    "unscale",
    "why_fixed",
    "why_unsupported",
]
