"""Read-only views of a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lit_stability.lightning_package import (
    Callback,
    GradClipAlgorithmType,
    LightningModule,
    Trainer,
    is_overridden,
)
from lit_stability.trainer_internals.patch import Patch


def logger_step(trainer: Trainer) -> int:
    """Returns the step that Lightning passes to its loggers; it never goes back."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def ends_window(trainer: Trainer) -> bool:
    """Returns whether the current (or just finished) batch is one with an optimizer step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def batch_index(trainer: Trainer) -> int:
    """Returns the index of the current batch in its epoch."""
    return trainer.fit_loop.epoch_loop.batch_idx


def batches_begun(trainer: Trainer) -> int:
    """Returns how many batches of this epoch were started."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def is_compiled(pl_module: LightningModule) -> bool:
    """Returns whether the module itself was compiled, by ``torch.compile(module)``."""
    return getattr(pl_module, "_compiler_ctx", None) is not None


def tear_down(trainer: Trainer) -> None:
    """Tears down a failed fit, if a callback that raised prevented the trainer from doing so."""
    trainer._teardown()


def clip_norm(trainer: Trainer) -> float | None:
    """Returns the norm to which Lightning clips the gradients before each update, or None.

    None also where the module clips by itself, in `configure_gradient_clipping` or in manual
    optimization: what it does is not known.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization or not trainer.gradient_clip_val:
        return None
    if is_overridden("configure_gradient_clipping", module):
        return None
    by_value = trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
    return None if by_value else float(trainer.gradient_clip_val)


def log_every(trainer: Trainer) -> int:
    """Returns the number of steps between writes to the loggers, at least 1."""
    return max(1, int(trainer.log_every_n_steps))  # type: ignore[attr-defined]


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Returns the callbacks of a trainer in the order in which they are called."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def is_called(trainer: Trainer, callback: Callback) -> bool:
    """Returns whether a trainer calls a callback now; a tuner replaces all for its search."""
    return any(each is callback for each in callbacks_of(trainer))


def patch_save_checkpoint(
    trainer: Trainer, around: Callable[[Callable[[], Any]], Any]
) -> Callable[[], None]:
    """Has a function called for every checkpoint that the Trainer is asked to save.

    Args:
        trainer: in its fit.
        around: gets the function that saves, which it calls once.

    Returns:
        A function that removes the patch.
    """
    save = trainer.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return around(lambda: save(*args, **kwargs))

    patch = Patch(trainer, "save_checkpoint", save_checkpoint)
    patch.apply()
    return patch.remove


def full_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Returns the checkpoint as Lightning saves it; its tensors are not copies."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def loss_scaler(trainer: Trainer) -> GradScaler | None:
    """Returns the gradient scaler of fp16 training, or None."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, GradScaler) and scaler.is_enabled() else None


def loss_scale_on_device(scaler: GradScaler | None) -> Tensor | None:
    """Returns the loss scale as a device tensor; None without a scaler, or before its start."""
    return None if scaler is None else scaler._scale


def unscale(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Unscales the gradients of a fused optimizer; Lightning keeps them scaled until the step."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
