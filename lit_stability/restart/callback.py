"""`RestartCallback`: the callback through which a recovery reaches into one fit.

May import Lightning.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_stability.callbacks.hooks import call_hook, lower_learning_rate
from lit_stability.restart.checkpoint_edits import count_in_parts, forget_moments
from lit_stability.restart.initial_state import InitialState
from lit_stability.restart.memory import batch_sizes
from lit_stability.restart.remedies import Plan
from lit_stability.trainer_internals import callbacks_of
from lit_stability.trainer_internals.skip_batches import TrainingData
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

_KEY = "lit_stability.restart"
_PARTS = "accumulate_grad_batches"
_OWNER = "restart"
"""Owner of this callback's factors on the learning rate."""


class RemedyFailedError(RuntimeError):
    """Raised before the first step when a remedy had no effect; the message says what to mend."""


class CountedInPartsError(RuntimeError):
    """Raised by the first fit if its checkpoint is from one whose batches had been cut."""

    def __init__(self, parts: int) -> None:
        super().__init__(f"the checkpoint counts in batches cut into {parts}")
        self.parts = parts


class RestartCallback(Callback):
    """Carries a plan out in one fit, and notes where it ends.

    The checkpoint is changed in memory, between its being read and its being restored: the file
    is never touched. A callback whose own state counts batches overrides
    `StabilityCallback.rescale_batch_counts`.

    Args:
        plan: what to do differently.
        first: whether this is the first fit, which is left as the user made it.
        initial_state: takes what the fit brings into being.
    """

    def __init__(self, plan: Plan, *, first: bool, initial_state: InitialState) -> None:
        self._plan, self._first, self._initial_state = plan, first, initial_state
        self._data: TrainingData | None = None
        self._lowered = False
        """Whether a callback has lowered the learning rate, and restores it."""
        self.error: BaseException | None = None
        """What ended the fit, as it was before any other callback heard of it."""
        self.not_fetched: tuple[Any, ...] | None = None
        """Samples of the batch that was being fetched."""
        self.position = (0, 0, 0)
        """Step, epoch, and batches begun in this epoch, when it ended."""

    @property
    def state_key(self) -> str:
        """By what its state is found in a checkpoint."""
        return _KEY

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow the data; leave it to the plan how careful a restart is."""
        self._data = TrainingData(trainer, self._plan.unwanted)
        if not self._first:
            call_hook("on_restart", trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Fit what was loaded to the plan."""
        if self._plan.forgets_moments:
            forget_moments(checkpoint)
        states = checkpoint.get("callbacks", {})
        written = states.get(_KEY, {}).get(_PARTS, self._plan.accumulation)
        now = trainer.accumulate_grad_batches
        if self._first and written > now and written % now == 0:
            raise CountedInPartsError(written // now)
        if written == now:
            return
        if now % written:
            raise RemedyFailedError(
                f"the checkpoint was written with accumulate_grad_batches={written}, this fit has "
                f"{now}: its place in the epoch has no equivalent"
            )
        parts = now // written
        count_in_parts(checkpoint, parts)
        for callback in callbacks_of(trainer):
            rescale = getattr(callback, "rescale_batch_counts", None)
            if callable(rescale) and callback.state_key in states:
                rescale(states[callback.state_key], parts)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of new layers; lower learning rate and clip where an AutoRollback holds them.

        Callbacks have their state back by now, and put it in force when the training starts.
        """
        if trainer.ckpt_path is None:
            self._initial_state.add(pl_module)
        self._lowered = self._plan.cut < 1 and lower_learning_rate(trainer, self._plan.cut)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that a halved batch size reached the data; lower the learning rate otherwise."""
        self._count_missing(True)
        self._check_batch_size(trainer)
        if self._plan.cut < 1 and not self._lowered:
            for optimizer in trainer.optimizers:
                factors = [self._plan.cut] * len(optimizer.param_groups)
                learning_rate_multiplier(optimizer).set(factors, _OWNER)
        for config in trainer.lr_scheduler_configs if self._plan.parts > 1 else []:
            if config.interval == "step":
                # Lightning counts it in batches, not in steps.
                config.frequency *= self._plan.parts

    def _check_batch_size(self, trainer: Trainer) -> None:
        if self._plan.parts == 1:
            return
        wanted, found = self._plan.batch_sizes, batch_sizes(trainer)
        for want, have in zip(wanted, found, strict=False):
            if want is not None and have is not None and want != have:
                raise RemedyFailedError(
                    f"batch_size was halved, but the training loader has batches of {have} instead "
                    f"of {want}: let train_dataloader() build it with the batch_size attribute"
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the epoch end where its data do."""
        self._count_missing(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have an epoch that lacks batches be validated."""
        if self._data is not None:
            self._data.batch_ended()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the next epoch be measured whole."""
        self._count_missing(False)

    def _count_missing(self, yes: bool) -> None:
        if self._data is not None:
            self._data.count(yes)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Note where the fit ended, while its loops still know."""
        loop = trainer.fit_loop.epoch_loop
        self.error = exception
        self.position = (
            trainer.global_step,
            trainer.current_epoch,
            loop.batch_progress.current.ready,
        )
        self.not_fetched = None if self._data is None else self._data.not_fetched()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was found."""
        if self._data is not None:
            self._data.close()
            self._data = None

    def state_dict(self) -> dict[str, Any]:
        """In which micro-batches the checkpoint counts, if not in those of the first fit."""
        if self._plan.parts == 1:
            return {}
        return {_PARTS: self._plan.overrides["accumulate_grad_batches"]}
