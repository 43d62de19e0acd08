"""All code that uses Lightning's private API.

`private.py` lists each private name with a replacement for it. Tests compare the list with the
source, and fail when a release of Lightning moves or renames one of them.
"""

from lit_stability.trainer_internals.batch_replay import BatchRecorder, RecordedBatch, ReplayRing
from lit_stability.trainer_internals.between_batches import BetweenBatches
from lit_stability.trainer_internals.callback_state import Stateful, keeps_state
from lit_stability.trainer_internals.checkpoint_ledger import CheckpointLedger
from lit_stability.trainer_internals.cluster import (
    Handler,
    handles_signals,
    program_handler,
    requeue_checkpoint,
    requeue_signal,
    signal_processes,
)
from lit_stability.trainer_internals.data_position import DataPosition
from lit_stability.trainer_internals.dataloaders import loaders
from lit_stability.trainer_internals.earlier_state import in_earlier_state
from lit_stability.trainer_internals.hyperparameters import hide_environment
from lit_stability.trainer_internals.loop_counters import (
    LoopState,
    count_skipped_batches,
    end_epoch_schedulers,
    has_room_to_move,
    move_batch_index,
)
from lit_stability.trainer_internals.measured_clipping import MeasuredClipping
from lit_stability.trainer_internals.metrics import EpochMetrics, LoggedMetrics, known_metrics
from lit_stability.trainer_internals.next_step import AroundNextStep
from lit_stability.trainer_internals.plain_attributes import PlainAttributes, owners_in
from lit_stability.trainer_internals.precision import (
    PrecisionSwitch,
    apply_fp32_modules,
    is_supported,
    why_fixed,
)
from lit_stability.trainer_internals.progress_bar import leave_out_unlimited_epochs
from lit_stability.trainer_internals.rank_step_guard import (
    RankStepGuard,
    agreed_failure,
    can_guard_ranks,
)
from lit_stability.trainer_internals.reference_step import (
    ReferenceStep,
    incomparable,
    replay_loss,
    same_batch,
    same_loss,
)
from lit_stability.trainer_internals.run_folder import (
    keep_records_in,
    keep_runs_below,
    local_path,
    run_directory,
    run_id,
    why_no_directory,
)
from lit_stability.trainer_internals.schedulers import describe_scheduler
from lit_stability.trainer_internals.skip_step import (
    SchedulerPause,
    StepSkipper,
    parameters_of,
    remove_gradients,
)
from lit_stability.trainer_internals.step_guard import StepFailure, StepGuard, step_failure
from lit_stability.trainer_internals.step_recording import (
    LOSS,
    StepRecording,
    StepResult,
    why_not_recorded,
)
from lit_stability.trainer_internals.step_rerun import Outcome, RecordedStep
from lit_stability.trainer_internals.strategies import (
    adapter_of,
    register_strategy,
    sharing,
)
from lit_stability.trainer_internals.trainer_view import (
    batch_index,
    batches_begun,
    callbacks_of,
    clip_norm,
    ends_window,
    full_checkpoint,
    is_called,
    is_compiled,
    log_every,
    logger_step,
    loss_scale_on_device,
    loss_scaler,
    patch_save_checkpoint,
    tear_down,
    unscale,
)
from lit_stability.trainer_internals.training_snapshot import (
    StepStart,
    TrainingSnapshot,
    incident_bytes,
    snapshot_bytes,
)
from lit_stability.trainer_internals.worker_exit import at_worker_exit

__all__ = [
    "LOSS",
    "AroundNextStep",
    "BatchRecorder",
    "BetweenBatches",
    "CheckpointLedger",
    "DataPosition",
    "EpochMetrics",
    "Handler",
    "LoggedMetrics",
    "LoopState",
    "MeasuredClipping",
    "Outcome",
    "PlainAttributes",
    "PrecisionSwitch",
    "RankStepGuard",
    "RecordedBatch",
    "RecordedStep",
    "ReferenceStep",
    "ReplayRing",
    "SchedulerPause",
    "Stateful",
    "StepFailure",
    "StepGuard",
    "StepRecording",
    "StepResult",
    "StepSkipper",
    "StepStart",
    "TrainingSnapshot",
    "adapter_of",
    "agreed_failure",
    "apply_fp32_modules",
    "at_worker_exit",
    "batch_index",
    "batches_begun",
    "callbacks_of",
    "can_guard_ranks",
    "clip_norm",
    "count_skipped_batches",
    "describe_scheduler",
    "end_epoch_schedulers",
    "ends_window",
    "full_checkpoint",
    "handles_signals",
    "has_room_to_move",
    "hide_environment",
    "in_earlier_state",
    "incident_bytes",
    "incomparable",
    "is_called",
    "is_compiled",
    "is_supported",
    "keep_records_in",
    "keep_runs_below",
    "keeps_state",
    "known_metrics",
    "leave_out_unlimited_epochs",
    "loaders",
    "local_path",
    "log_every",
    "logger_step",
    "loss_scale_on_device",
    "loss_scaler",
    "move_batch_index",
    "owners_in",
    "parameters_of",
    "patch_save_checkpoint",
    "program_handler",
    "register_strategy",
    "remove_gradients",
    "replay_loss",
    "requeue_checkpoint",
    "requeue_signal",
    "run_directory",
    "run_id",
    "same_batch",
    "same_loss",
    "sharing",
    "signal_processes",
    "snapshot_bytes",
    "step_failure",
    "tear_down",
    "unscale",
    "why_fixed",
    "why_no_directory",
    "why_not_recorded",
]
