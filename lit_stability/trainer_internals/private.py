"""Every private name of Lightning, torchmetrics, torch and DeepSpeed that this package uses.

None of them is public API: each may be renamed by a release. A test compares this list with the
source, name by name and room by room; another looks each path up on a real Trainer. Lightning's
and torchmetrics' are used in this room only. ``instead`` says what would take the place of a name
that is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LIGHTNING_VERSIONS = ("2.6.0", "2.6.6")
"""Oldest and newest version of lightning that the tests were run on."""


@dataclass(frozen=True)
class Private:
    """A name that starts with an underscore, or is imported from a private module."""

    name: str
    """An attribute; for an import ``module:name``."""
    instead: str
    """What would replace it."""
    rooms: tuple[str, ...] = ("trainer_internals",)
    paths: tuple[str, ...] = field(default=(), kw_only=True)
    """Where it is found below a Trainer in a fit."""


_OWN_COUNT = "a count of our own, kept in on_train_batch_end"
_OWN_LOOP = "a fit loop of our own, given to the Trainer in on_fit_start"
_STATE_DICT = "the callback's state_dict, which leaves it out today"
_KEEP_LOGGED = "Trainer.callback_metrics, and without it metrics of a skipped batch stay visible"

LIGHTNING = (
    Private(
        "_accelerator_connector",
        "SLURMEnvironment.detect, which does not know what the user passed to the Trainer",
        paths=("_accelerator_connector.cluster_environment",),
    ),
    Private(
        "_average_model",
        "WeightAveraging.state_dict, at the price of a copy",
    ),
    Private(
        "_batches_that_stepped",
        _OWN_COUNT,
        paths=("fit_loop.epoch_loop._batches_that_stepped",),
    ),
    Private(
        "_build_kwargs",
        "inspect.signature of training_step",
        paths=("fit_loop.epoch_loop._build_kwargs",),
    ),
    Private("_callback_metrics", _KEEP_LOGGED, paths=("_logger_connector._callback_metrics",)),
    Private(
        "_checkpoint_connector",
        "Trainer.save_checkpoint to memory",
        paths=("_checkpoint_connector.dump_checkpoint", "_checkpoint_connector.hpc_save_path"),
    ),
    Private(
        "_combined_loader",
        "Trainer.train_dataloader",
        paths=("fit_loop._combined_loader",),
    ),
    Private("_compiler_ctx", "has_compiled_parts", paths=("lightning_module._compiler_ctx",)),
    Private("_current_fx", _KEEP_LOGGED, paths=("_logger_connector._current_fx",)),
    Private(
        "_data_fetcher",
        "a data loader of our own around the user's",
        paths=("fit_loop._data_fetcher",),
    ),
    Private("_DataLoaderIterDataFetcher", "the signature of training_step"),
    Private("_defer_save_until_validation", _STATE_DICT),
    Private(
        "_forward_redirection",
        "no rerun of a step under FSDP1",
        paths=("strategy._forward_redirection",),
    ),
    Private("_get_train_description", "a subclass of RichProgressBar"),
    Private("_first_loop_iter", _KEEP_LOGGED, paths=("_logger_connector._first_loop_iter",)),
    Private(
        "_get_loops_state_dict",
        "Trainer.save_checkpoint to memory",
        paths=("_checkpoint_connector._get_loops_state_dict",),
    ),
    Private("_hparams_initial", "a callback that logs hyperparameters in place of Lightning"),
    Private("_internal_optimizer_metadata", _STATE_DICT),
    Private("_iterator", "a data loader of our own around the user's"),
    Private("_last_checkpoint_saved", _STATE_DICT),
    Private("_last_global_step_saved", _STATE_DICT),
    Private(
        "_last_train_dl_reload_epoch",
        "refusing to resume with reload_dataloaders_every_n_epochs",
        paths=("fit_loop._last_train_dl_reload_epoch",),
    ),
    Private("_latest_update_epoch", _STATE_DICT),
    Private("_latest_update_step", _STATE_DICT),
    Private(
        "_load_combined_loader_states",
        "on_train_start, which comes after the first shuffle is drawn",
        paths=("fit_loop._load_combined_loader_states",),
    ),
    Private("_logged_metrics", _KEEP_LOGGED, paths=("_logger_connector._logged_metrics",)),
    Private("_logger_connector", _KEEP_LOGGED),
    Private("_model_averaging_period", "refusing every DDPStrategy with a comm hook"),
    Private(
        "_num_ready_batches_reached",
        "batch_progress.is_last_batch",
        paths=("fit_loop.epoch_loop._num_ready_batches_reached",),
    ),
    Private(
        "_original_handlers",
        "signal.getsignal at setup, which misses handlers that are installed after it",
        paths=("_signal_connector._original_handlers",),
    ),
    Private(
        "_progress_bar_metrics", _KEEP_LOGGED, paths=("_logger_connector._progress_bar_metrics",)
    ),
    Private("_register_ddp_hooks", "a restart of the fit in the other precision"),
    Private(
        "_results",
        "metrics of a skipped batch stay in the epoch's mean",
        paths=("fit_loop.epoch_loop._results",),
    ),
    Private(
        "_setup_model",
        "a restart of the fit in the other precision",
        paths=("strategy._setup_model",),
    ),
    Private(
        "_should_accumulate",
        "accumulate_grad_batches and the batch index",
        paths=("fit_loop.epoch_loop._should_accumulate",),
    ),
    Private(
        "_should_check_val_fx",
        "one validation too many after a resume",
        paths=("fit_loop.epoch_loop._should_check_val_fx",),
    ),
    Private("_signal_connector", "signal.getsignal at setup"),
    Private(
        "_skip_next_val",
        _OWN_LOOP,
        paths=("fit_loop.epoch_loop._skip_next_val",),
    ),
    Private("_Stateful", "hasattr of its two methods"),
    Private(
        "_teardown", "leaving the failed trainer to the garbage collector", paths=("_teardown",)
    ),
    Private("_timeout", "RankWatchdog(timeout=...), which the user then has to set as well"),
)

PATHS = (
    *(path for each in LIGHTNING for path in each.paths),
    "fit_loop.epoch_loop.automatic_optimization.optim_progress",
    "fit_loop.epoch_loop.batch_idx",
    "fit_loop.epoch_loop.batch_progress.is_last_batch",
    "fit_loop.epoch_loop.manual_optimization.optim_step_progress",
    "fit_loop.epoch_loop.scheduler_progress",
    "fit_loop.epoch_loop.update_lr_schedulers",
    "fit_loop.epoch_loop.val_loop.batch_progress",
    "fit_loop.epoch_progress",
    "fit_loop.setup_data",
    "strategy.lr_scheduler_configs",
)
"""Paths below a Trainer that are relied on, those of names without an underscore included."""

TORCHMETRICS = (
    Private("_computed", "Metric.reset"),
    Private("_defaults", "Metric.state_dict with persistent states"),
    Private("_update_count", "Metric.update_count, which cannot be set"),
)

_MODULE = "Module.named_parameters and named_buffers, and setattr on their owners"
_FOREACH = "a loop over the tensors, several times slower"
_STORAGE = "UntypedStorage.data_ptr, which is reused when memory is freed"
_FSDP1 = "FSDP2, whose shards are DTensors"
_SCHEMA = "the operator's signature, passed as text"

TORCH = (
    Private("_C", "no operation of the backward pass is named", ("diagnosis",)),
    Private("_DisableAutocast", "no operation of the backward pass is named", ("diagnosis",)),
    Private(
        "_backward_hooks",
        "comparing gradients that hooks of the user have changed, which often differ",
    ),
    Private("_buffers", _MODULE, ("training_state", "trainer_internals")),
    Private("_cdata", _STORAGE, ("diagnosis", "training_state")),
    Private("_compiled_call_impl", "asking the user", ("measurement",)),
    Private("_current_autograd_node", "no operation of the backward pass is named", ("diagnosis",)),
    Private("_dynamo", "a longer timeout for every step of a watchdog", ("distributed",)),
    Private("_flat_weights", "RNNBase.flatten_parameters"),
    Private("_flat_weights_names", "RNNBase.flatten_parameters"),
    Private("_foreach_copy_", _FOREACH, ("training_state",)),
    Private("_foreach_mul_", _FOREACH, ("training_state",)),
    Private("_foreach_norm", _FOREACH, ("measurement", "training_state")),
    Private("_foreach_zero_", _FOREACH, ("training_state",)),
    Private("_get_file_writer", "a second event file", ("tensorboard",)),
    Private(
        "_get_sequence_number_for_group",
        "a wrapper around each collective of torch.distributed, or catching nothing on ranks",
    ),
    Private("_handle", _FSDP1),
    Private("_inductor", "a longer timeout for every step of a watchdog", ("distributed",)),
    Private("_is_root", _FSDP1),
    Private("_num_yielded", "a count in the sampler"),
    Private("_opt_called", "a flag that schedulers set, restored with the user's own"),
    Private("_opname", _SCHEMA, ("diagnosis",)),
    Private("_orig_mod", "asking the user", ("measurement",)),
    Private("_parameters", _MODULE),
    Private(
        "_optimizer_step_post_hooks",
        "registering the hook before all others, at the start of the fit",
        ("training_state",),
    ),
    Private("_params", _FSDP1),
    Private(
        "_post_accumulate_grad_hooks",
        "refusing models with such hooks",
        ("training_state", "trainer_internals"),
    ),
    Private("_scale", "GradScaler.get_scale, which waits for the device"),
    Private("_schedulers", "the state_dict of each scheduler in it", ("cli", "trainer_internals")),
    Private("_schema", _SCHEMA, ("diagnosis", "measurement")),
    Private("_set_grad_enabled", "torch.set_grad_enabled", ("diagnosis",)),
    Private("_step_supports_amp_scaling", "the fused option of the groups"),
    Private("_to_copy", "the name of the operator, as text", ("diagnosis",)),
    Private("_values", "Tensor.coalesce().values()", ("diagnosis",)),
    Private(
        "_base", "parameters that are not views, of which a part is never found", ("measurement",)
    ),
    Private(
        "_version",
        "comparing copies",
        ("callbacks", "measurement", "trainer_internals", "training_state"),
    ),
    Private("torch.autograd.graph:_engine_run_backward", "torch.autograd.backward", ("diagnosis",)),
    Private("torch.distributed.fsdp._runtime_utils:_reshard", _FSDP1),
    Private("torch.nn.modules.batchnorm:_NormBase", "a tuple of its subclasses", ("checks",)),
    Private("torch.nn.modules.conv:_ConvNd", "a tuple of its subclasses", ("checks",)),
    Private("torch.nn.modules.dropout:_DropoutNd", "a tuple of its subclasses", ("checks",)),
    Private(
        "torch.utils._python_dispatch:TorchDispatchMode",
        "__torch_function__ modes, which do not see the backward pass",
        ("compat", "diagnosis"),
    ),
    Private(
        "torch.utils._python_dispatch:_get_current_dispatch_mode",
        "measuring no attention while another mode is active",
        ("measurement",),
    ),
)

_ZERO = "refusing DeepSpeed: its public functions return copies, of all ranks together"
DEEPSPEED = (
    Private("_copy_recovery_script", _ZERO),
    Private("_get_fp32_grad_state_partition", _ZERO),
    Private("_hp_mapping", _ZERO),
    Private("_hp_optimizer_states_linked", _ZERO),
    Private("_index_in_param_group", _ZERO),
    Private("_overflow_check_and_loss_scale_update", _ZERO),
    Private("_update_scale", _ZERO),
)

PRIVATE = (*LIGHTNING, *TORCHMETRICS, *TORCH, *DEEPSPEED)
