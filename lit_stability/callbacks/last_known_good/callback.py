"""`LastKnownGood`: a checkpoint on disk that healthy steps confirmed, and the way back to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.last_known_good.checkpoint_manager import CheckpointManager
from lit_stability.callbacks.last_known_good.resume_check import PreviousRun, ResumeVerification
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.incidents import Incident
from lit_stability.measurement.step_stats import StepStats
from lit_stability.trainer_internals import (
    DataPosition,
    EpochMetrics,
    full_checkpoint,
    run_directory,
)
from lit_stability.training_state.async_writer import AsyncCheckpointWriter
from lit_stability.training_state.good_checkpoints import FOLDER, State

log = logging.getLogger("lightning.pytorch.lit_stability")


class LastKnownGood(StabilityCallback):
    """Keeps checkpoints on disk that are known to be good, and goes on from them exactly.

    On one device; on several it keeps nothing and says so.

    Between two batches the complete state is copied to memory; after ``confirm_after`` healthy
    steps without an incident it is written in the background, to ``good/step=<step>.ckpt`` in
    ``trainer.log_dir``. An incident or a rollback discards a copy that is not confirmed yet. One
    with a NaN or Inf in weights, buffers or optimizer state is refused; buffers that were
    non-finite when the fit began, such as a mask of -inf, are taken for constants. The first copy
    is taken before the first step. What cannot be written is told of once; training goes on.

    ``Trainer.fit(ckpt_path=find_last_good(folder))`` goes on where the copy was taken: generators,
    the batch that came next, aggregates of the epoch. Before the first step the loss of one kept
    batch is computed again and compared with the one it had. If the run behind the checkpoint
    ended in an exception, learning rate and clip are lowered for a while, where the trainer has an
    `AutoRollback`; after an interruption (a kill, SIGTERM, Ctrl-C) the run is the one that was
    interrupted, bit for bit.

    What does not come back: data that `DataPosition` says it cannot position; what a module,
    a data module or a data set counts in its own attributes without saving it. The batches that
    the epoch has had are read again and dropped. ``training_step`` runs once more on the kept
    batch, with ``self.log`` silenced; what else it does happens once more.

    With this callback every checkpoint of the trainer carries the position in the data. From one
    that was saved at the end of a batch before its validation, Lightning goes on without that
    validation, and the generators stand where they stood before it.

    Args:
        every_n_steps: optimizer steps between copies. A run that is killed loses at most these,
            ``confirm_after`` and the steps taken during one write.
        confirm_after: healthy steps after which a copy is good.
        keep: files kept.
        max_batch_bytes: a larger batch is not kept to verify a restore with.
        on_mismatch: what to do when the restored state gives another loss.
        after_crash: what learning rate and clip are multiplied by, once for every failure in a
            row, three at most, when the run behind the checkpoint failed; 1 to go on as if it had
            not.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 500,
        confirm_after: int = 10,
        keep: int = 2,
        max_batch_bytes: int = 32 * 2**20,
        on_mismatch: Literal["raise", "warn"] = "raise",
        after_crash: float = 0.5,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("confirm_after", confirm_after, 1),
            ("keep", keep, 1),
            ("max_batch_bytes", max_batch_bytes, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if on_mismatch not in ("raise", "warn"):
            raise ValueError(f"on_mismatch must be 'raise' or 'warn', got {on_mismatch!r}")
        if not 0 < after_crash <= 1:
            raise ValueError(f"after_crash must be in (0, 1], got {after_crash!r}")
        self.every_n_steps = every_n_steps
        self.confirm_after = confirm_after
        self.keep = keep
        self.max_batch_bytes = max_batch_bytes
        self.on_mismatch: Literal["raise", "warn"] = on_mismatch
        self.after_crash = after_crash
        self._fit: _Fit | None = None
        self._restored: Mapping[str, Any] = {}
        self._capturing = False
        self._lowers_after_crash = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; follow the data from their first iteration on.

        Raises:
            ValueError: without a `GradientMonitor` before it.
        """
        if stage != "fit":
            return
        require_monitor(trainer, self)
        self._restored = {}
        if trainer.world_size > 1:
            # The position in the data is one for each rank, the file is of rank zero.
            if trainer.is_global_zero:
                log.info("LastKnownGood keeps nothing on several devices: use ModelCheckpoint")
            return
        self._fit = _Fit(self, trainer, pl_module)

    def on_restart(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it to the remedy how careful this fit is: it knows the crash, this does not."""
        self._lowers_after_crash = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look how the run behind the checkpoint ended, and be careful if it failed."""
        if self._fit is not None:
            self._fit.previous = PreviousRun(trainer)
            self._fit.previous.lower_after_crash(
                self.after_crash if self._lowers_after_crash else 1.0
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Arrange that a resumed fit goes on where its checkpoint was taken."""
        if self._fit is not None:
            self._fit.start(self._restored)
        self._restored = {}

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Count towards the copy's confirmation."""
        if self._fit is not None and self._fit.manager is not None:
            self._fit.manager.healthy(self.state_key)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Trust no copy that is not confirmed."""
        if incident.anomaly.warn_only:
            return
        if self._fit is not None and self._fit.manager is not None:
            self._fit.manager.discard()

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trust no copy that is not confirmed; count from the step that was gone back to."""
        if self._fit is not None and self._fit.manager is not None:
            self._fit.manager.rolled_back()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a resume, complete the epoch's aggregates and tell of it."""
        if self._fit is not None:
            self._fit.epoch.add(trainer)
            self._fit.verification.after_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of what belonged to the epoch."""
        if self._fit is not None:
            self._fit.epoch.forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish writing."""
        if self._fit is not None:
            self._fit.end("finished")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Finish writing, and note how the run ended."""
        if self._fit is None:
            return
        # Lightning ends a fit at SIGTERM with a kind of SystemExit.
        interrupted = isinstance(exception, (KeyboardInterrupt, SystemExit))
        reason = f"{type(exception).__name__}: {exception}".splitlines()[0][:500]
        self._fit.end("interrupted" if interrupted else "failed", reason)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave trainer and memory as they were found."""
        if stage == "fit":
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, the generators and the epoch's aggregates; {} outside a fit."""
        position = {} if self._fit is None else self._fit.position.state_dict()
        if self._fit is None or not position:
            return {}
        epoch = EpochMetrics.state_dict(self._fit.trainer, epoch_over=position["epoch_over"])
        return {
            "position": position,
            "epoch": epoch,
            "between_batches": self._capturing,
            "time": time.time(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep such a state until the training starts."""
        self._restored = state_dict

    def rescale_batch_counts(self, state: dict[str, Any], micro_batches: int) -> None:
        """Change a state of this callback to one that counts each batch as so many.

        Args:
            state: what `state_dict` returned.
            micro_batches: what every batch has been cut into.
        """
        position = state["position"]
        position["batches"] *= micro_batches
        position["states"] = {i * micro_batches: s for i, s in position["states"].items()}
        # The whole batch would not fit into memory, nor give the loss of a part.
        state.pop("kept", None)

    def checkpoint(self, trainer: Trainer) -> dict[str, Any]:
        """Lightning's checkpoint between two batches; its tensors are the live ones."""
        self._capturing = True
        try:
            return full_checkpoint(trainer)
        finally:
            self._capturing = False

    def _release(self) -> None:
        if self._fit is not None:
            self._fit.verification.close()
            self._fit.position.detach()
        self._fit = None


class _Fit:
    """What lives as long as one fit."""

    def __init__(self, owner: LastKnownGood, trainer: Trainer, pl_module: LightningModule) -> None:
        self.owner, self.trainer, self.module = owner, trainer, pl_module
        self.position = DataPosition(self._between_batches)
        self.position.attach(trainer)
        self.epoch = EpochMetrics()
        self.verification = ResumeVerification(None, owner.on_mismatch)
        self.previous: PreviousRun | None = None
        self.manager: CheckpointManager | None = None
        self._begun = False

    def start(self, restored: Mapping[str, Any]) -> None:
        """Prepare to write, and to take up the position."""
        directory, owner = run_directory(self.trainer), self.owner
        if directory is not None:
            self.manager = CheckpointManager(
                self.trainer,
                self.module,
                AsyncCheckpointWriter(directory / FOLDER, owner.keep),
                every_n_steps=owner.every_n_steps,
                confirm_after=owner.confirm_after,
                max_batch_bytes=owner.max_batch_bytes,
            )
        if (
            self.manager is not None
            and self.previous is not None
            and self.previous.source is not None
        ):
            self.manager.last = self.trainer.global_step
        if self.position.obstacle is not None:
            log.warning("a resume cannot position the data: %s", self.position.obstacle)
        if restored:
            self.position.resume(restored["position"], between_batches=restored["between_batches"])
            self.verification = ResumeVerification(restored.get("kept"), owner.on_mismatch)
            self.epoch.resume(self.trainer, restored["epoch"])

    def _between_batches(self) -> None:
        if not self._begun:
            self.verification.before_first_batch(self.trainer, self.module)
            if self.manager is not None and self.previous is not None:
                self.previous.clear(self.manager.writer.folder)
            self._begun = True
            self._note("running")
        if self.manager is not None:
            self.manager.between_batches(lambda: self.owner.checkpoint(self.trainer))

    def end(self, state: State, reason: str = "") -> None:
        """Finish writing; note how the fit ended, if it had begun."""
        if self.manager is not None:
            self.manager.close()
        if self._begun:
            self._note(state, reason)

    def _note(self, state: State, reason: str = "") -> None:
        if self.manager is not None and self.previous is not None:
            writer = self.manager.writer
            self.previous.note(writer.folder, writer.newest, state, reason)
