"""`RestartCallback`: applies a recovery plan inside one fit.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_stability.callbacks.hooks import StabilityCallback, lower_learning_rate
from lit_stability.callbacks.last_known_good.own_part import replace_by_own
from lit_stability.lightning_package import (
    Callback,
    LightningModule,
    Trainer,
    lightning_getattr,
    lightning_setattr,
)
from lit_stability.restart.checkpoint_edits import clear_optimizer_state, rescale_batch_progress
from lit_stability.restart.initial_state import InitialState
from lit_stability.restart.memory import batch_sizes
from lit_stability.restart.remedies import Plan
from lit_stability.trainer_internals import batches_begun, callbacks_of
from lit_stability.trainer_internals.skip_batches import TrainingData
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

_KEY = "lit_stability.restart"
_PARTS = "accumulate_grad_batches"
_OWNER = "restart"
"""Owner of this callback's factors on the learning rate."""


class RemedyFailedError(RuntimeError):
    """Raised before the first step if a remedy had no effect; the message says what to fix."""


class SmallerMicroBatchesError(RuntimeError):
    """Raised by the first fit if its checkpoint is from a fit with smaller micro-batches."""

    def __init__(self, parts: int) -> None:
        super().__init__(f"the checkpoint counts micro-batches that were split into {parts}")
        self.parts = parts


class RestartCallback(Callback):
    """Applies a plan in one fit, and records where the fit ends.

    The checkpoint is changed in memory after it was loaded and before it is restored; the file is
    never changed. A callback whose own state counts batches overrides
    `StabilityCallback.rescale_batch_counts`.

    Args:
        plan: what this fit does differently.
        first: whether this is the first fit, which runs as the user configured it.
        initial_state: records layers and parameters that the fit creates; None if no fit starts
            from them.
        batch_size: the halved ``batch_size`` of module or data module, in a new process.
        on_setup: called in ``setup``, when the ranks are connected.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        first: bool,
        initial_state: InitialState | None,
        batch_size: int | None = None,
        on_setup: Callable[[Trainer], None] | None = None,
    ) -> None:
        self._plan, self._first, self._initial_state = plan, first, initial_state
        self._batch_size, self._on_setup = batch_size, on_setup
        self._module: LightningModule | None = None
        self._data: TrainingData | None = None
        self.error: BaseException | None = None
        """The exception that ended the fit, before any other callback could raise another."""
        self.not_fetched: tuple[Any, ...] | None = None
        """Samples of the batch that was being fetched when the fit ended."""
        self.position = (0, 0, 0)
        """Step, epoch, and number of batches started in this epoch, when the fit ended."""

    @property
    def state_key(self) -> str:
        """Returns the key of this callback's state in a checkpoint."""
        return _KEY

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Installs the filter for skipped batches, and calls ``on_restart`` in a restarted fit."""
        self._data, self._module = TrainingData(trainer, self._plan.unwanted), pl_module
        if self._on_setup is not None:
            self._on_setup(trainer)
        if self._batch_size is not None:
            lightning_setattr(pl_module, "batch_size", self._batch_size)
        if not self._first:
            for callback in callbacks_of(trainer):
                if isinstance(callback, StabilityCallback):
                    callback.on_restart(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Changes the loaded checkpoint according to the plan.

        Raises:
            SmallerMicroBatchesError: if the checkpoint counts smaller micro-batches than this fit.
            RemedyFailedError: if the position in the epoch cannot be converted.
        """
        replace_by_own(trainer, checkpoint)
        if self._plan.clears_optimizer_state:
            clear_optimizer_state(checkpoint)
        states = checkpoint.get("callbacks", {})
        written = states.get(_KEY, {}).get(_PARTS, self._plan.accumulation)
        now = trainer.accumulate_grad_batches
        if self._first and written > now and written % now == 0:
            raise SmallerMicroBatchesError(written // now)
        if written == now:
            return
        if now % written:
            raise RemedyFailedError(
                f"the checkpoint was written with accumulate_grad_batches={written}, which does "
                f"not divide the {now} of this fit: its position in the epoch cannot be converted"
            )
        parts = now // written
        rescale_batch_progress(checkpoint, parts)
        for callback in callbacks_of(trainer):
            rescale = getattr(callback, "rescale_batch_counts", None)
            if callable(rescale) and callback.state_key in states:
                rescale(states[callback.state_key], parts)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records layers that were created since ``setup``."""
        if self._initial_state is not None and trainer.ckpt_path is None:
            self._initial_state.add(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that a halved batch size is in use, and lowers the learning rate and the clip.

        A callback such as AutoRollback does so, if there is one, and raises them again later.

        Raises:
            RemedyFailedError: if the training loader ignores the halved batch size.
        """
        self._count_missing(True)
        self._check_batch_size(trainer)
        if self._plan.cut < 1 and not lower_learning_rate(trainer, self._plan.cut):
            for optimizer in trainer.optimizers:
                factors = [self._plan.cut] * len(optimizer.param_groups)
                learning_rate_multiplier(optimizer).set(factors, _OWNER)
        for config in trainer.lr_scheduler_configs if self._plan.parts > 1 else []:
            if config.interval == "step":
                # Lightning counts the frequency in batches, not in optimizer steps.
                config.frequency *= self._plan.parts

    def _check_batch_size(self, trainer: Trainer) -> None:
        if self._plan.parts == 1:
            return
        wanted, found = self._plan.batch_sizes, batch_sizes(trainer)
        for want, have in zip(wanted, found, strict=False):
            if want is not None and have is not None and want != have:
                raise RemedyFailedError(
                    f"batch_size was halved, but the training loader has batches of {have} instead "
                    f"of {want}: use the batch_size attribute in train_dataloader()"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the epoch end where its data end if batches are skipped."""
        self._count_missing(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lets an epoch with skipped batches reach its validation."""
        if self._data is not None:
            self._data.batch_ended()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the next epoch be measured with all its batches."""
        self._count_missing(False)

    def _count_missing(self, yes: bool) -> None:
        if self._data is not None:
            self._data.count(yes)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Records the exception and the position of the loops before Lightning resets them."""
        self.error = exception
        self.position = (
            trainer.global_step,
            trainer.current_epoch,
            batches_begun(trainer),
        )
        self.not_fetched = None if self._data is None else self._data.not_fetched()

    def halved_batch_size(self) -> int | None:
        """Returns the ``batch_size`` of module or data module, if it was halved."""
        if self._plan.parts == 1 or self._module is None:
            return None
        size = lightning_getattr(self._module, "batch_size")
        assert isinstance(size, int)
        return size

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the filter for skipped batches from the trainer."""
        if self._data is not None:
            self._data.close()
            self._data = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the accumulation of this fit if it differs from that of the first fit."""
        if self._plan.parts == 1:
            return {}
        return {_PARTS: self._plan.overrides["accumulate_grad_batches"]}
