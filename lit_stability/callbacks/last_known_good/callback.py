"""`LastKnownGood`: keeps checkpoints on disk that healthy steps confirmed, and resumes exactly."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lit_stability.callbacks.auto_rollback import AutoRollback
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.last_known_good.checkpoint_manager import CheckpointManager
from lit_stability.callbacks.last_known_good.own_part import (
    log_other_ranks,
    of_rank,
    replace_by_own,
    restore_buffers,
)
from lit_stability.callbacks.last_known_good.resume_check import PreviousRun, ResumeVerification
from lit_stability.callbacks.requirements import gather_of, monitor_of, require_monitor
from lit_stability.distributed.collectives import Ranks
from lit_stability.incidents import Incident
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, SIGTERMException, Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import guarded
from lit_stability.renamed import renamed
from lit_stability.trainer_internals import (
    DataPosition,
    EpochMetrics,
    adapter_of,
    callbacks_of,
    full_checkpoint,
    run_directory,
    sharing,
    why_no_directory,
)
from lit_stability.training_state.async_writer import AsyncCheckpointWriter
from lit_stability.training_state.good_checkpoints import FOLDER, State
from lit_stability.training_state.rank_checkpoint_writer import RankCheckpointWriter

log = suite_logger()


class LastKnownGood(StabilityCallback):
    """Keeps checkpoints on disk that are known to be good, and resumes from them exactly.

    Works on one device, and on several ranks with DDP, FSDP2 or DeepSpeed. With another strategy
    it keeps nothing and logs that.

    Between two batches the callback copies the complete state to the memory of the host. From an
    accelerator, weights and moments are copied while the program goes on, to pinned memory that the
    next copy uses again; the device makes its next step after that. After ``confirm_after`` healthy
    steps without an incident the callback writes the copy in the background, to
    ``good/step=<step>.ckpt`` in the folder of the run. An incident or a rollback discards a copy
    that is not confirmed yet, and so does a program that writes weights or moments itself while
    they are copied: training then waits for later copies. A copy with a NaN or Inf in weights,
    buffers or optimizer state is rejected; buffers that were non-finite when the fit began, such as
    a mask of -inf, count as constants. The first copy is taken before the first step. If a write
    fails, the callback warns once and training continues.

    At the end of the fit the newest confirmed snapshot of an `AutoRollback` is written, if it is
    newer than the last copy; on one device also where the fit ends in an exception or with Ctrl-C.
    The weights are restored to that step for as long as the copy takes, and then to what they were.
    Nothing is written then at SIGTERM, for which `PreemptionCheckpoint` saves, or where memory is
    so short that one snapshot is kept.

    ``Trainer.fit(ckpt_path=find_last_good(folder))`` resumes where the copy was taken: with the RNG
    states, the next batch and the epoch's aggregated metrics. Before the first step it recomputes
    the loss of one kept batch and compares it with the saved loss. If the previous run ended in an
    exception, learning rate and clip are lowered for a while, if the trainer has an `AutoRollback`.
    After an interruption (a kill, SIGTERM, Ctrl-C) the run continues bit for bit.

    Several ranks write a folder together, ``good/step=<step>``: of replicas rank 0 writes the
    weights, of sharded weights each rank its shards, with DeepSpeed in its files, and each rank its
    own RNG states, position in the data and metrics. It is called ``good/step=<step>.part`` until
    all ranks have written their part. If one of them cannot, or has a NaN or Inf, none keeps this
    copy. With sharded weights the first copy is taken after the first step.

    As many ranks as wrote it continue exactly. With another number of ranks, weights and optimizer
    states are restored, and RNG states and epoch metrics are not. The position in the data is
    converted if the only training loader has PyTorch's ``DistributedSampler``: its samples are in
    the same order for any number of ranks, and as many of them are left out as were trained on.
    If these do not fill whole batches of the new ranks, or for another sampler, the resume is
    refused in the middle of an epoch. A checkpoint that another callback saved has the state of
    rank 0 only: the other ranks continue with their own random numbers.

    Not restored: data that `DataPosition` cannot position, and what a module, a data module or a
    data set counts in its own attributes without saving it. A resume reads the earlier batches of
    the epoch again and drops them. ``training_step`` runs one extra time on the kept batch, with
    ``self.log`` silenced; its other side effects happen twice.

    With this callback every checkpoint of the trainer holds the position in the data. A checkpoint
    that was saved at the end of a batch, before its validation, resumes in Lightning without that
    validation, and with the RNG states from before it.

    >>> from lit_stability import find_last_good, stability_callbacks
    >>> suite = stability_callbacks(good=dict(every_n_steps=1000, keep=3))
    >>> def resume(trainer, model, run):
    ...     trainer.fit(model, ckpt_path=find_last_good(run))

    Args:
        every_n_steps: optimizer steps between copies. A run that is killed loses at most these,
            ``confirm_after`` and the steps that run during one write.
        every_n_seconds: a copy is also due when the last one is older; None for no such bound.
        confirm_after: healthy steps after which a copy is good.
        keep: number of files kept.
        max_batch_bytes: a larger batch is not kept, and a resume is then not verified.
        on_mismatch: what to do if the restored state gives another loss.
        lr_factor_after_crash: factor on learning rate and clip if the previous run failed, applied
            once for each failure in a row, at most three times; 1 to change nothing.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @renamed(after_crash="lr_factor_after_crash")
    def __init__(
        self,
        *,
        every_n_steps: int = 500,
        confirm_after: int = 10,
        keep: int = 2,
        max_batch_bytes: int = 32 * 2**20,
        on_mismatch: Literal["raise", "warn"] = "raise",
        lr_factor_after_crash: float = 0.5,
        every_n_seconds: float | None = 300.0,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("confirm_after", confirm_after, 1),
            ("keep", keep, 1),
            ("max_batch_bytes", max_batch_bytes, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if every_n_seconds is not None and not every_n_seconds > 0:
            raise ValueError(
                f"every_n_seconds must be a positive number or None, got {every_n_seconds!r}"
            )
        if on_mismatch not in ("raise", "warn"):
            raise ValueError(f"on_mismatch must be 'raise' or 'warn', got {on_mismatch!r}")
        if not 0 < lr_factor_after_crash <= 1:
            raise ValueError(
                f"lr_factor_after_crash must be in (0, 1], got {lr_factor_after_crash!r}"
            )
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.confirm_after = confirm_after
        self.keep = keep
        self.max_batch_bytes = max_batch_bytes
        self.on_mismatch: Literal["raise", "warn"] = on_mismatch
        self.lr_factor_after_crash = lr_factor_after_crash
        self._fit: _Fit | None = None
        self._restored: Mapping[str, Any] = {}
        self._buffers: Mapping[str, Tensor] = {}
        self._capturing = False
        self._lowers_after_crash = True

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_fit": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts to record the position in the data.

        Raises:
            ValueError: without a `GradientMonitor` before it.
        """
        if stage != "fit":
            return
        require_monitor(trainer, self)
        self._release()
        self._restored, self._buffers = {}, {}
        obstacle = adapter_of(trainer).why_no_good_checkpoint
        if obstacle is not None:
            if trainer.is_global_zero:
                log.info(
                    "LastKnownGood keeps nothing with %s (%s): use ModelCheckpoint",
                    *(type(trainer.strategy).__name__, obstacle),
                )
            return
        self._fit = _Fit(self, trainer, pl_module)

    def startup_text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Returns how often a checkpoint is kept, and what its copy in memory takes."""
        manager = None if self._fit is None else self._fit.manager
        return "" if manager is None else manager.startup_text()

    def on_restart(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turns off `lr_factor_after_crash`: the remedy chosen for the crash replaces it."""
        self._lowers_after_crash = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Replaces what rank 0 has saved for itself by what this rank has saved."""
        if self._fit is not None:
            self._buffers = replace_by_own(trainer, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares a resumed fit to continue where its checkpoint was taken.

        Lowers learning rate and clip if the previous run failed. With sharded weights the other
        callbacks have restored their state by now, but not in ``on_fit_start``.
        """
        if self._fit is not None:
            self._fit.previous = PreviousRun(trainer)
            self._fit.previous.lower_after_crash(
                self.lr_factor_after_crash if self._lowers_after_crash else 1.0
            )
            self._fit.start(self._restored, self._buffers)
        self._restored, self._buffers = {}, {}

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Counts a healthy step, which may confirm the copy."""
        if self._fit is not None and self._fit.manager is not None:
            self._fit.manager.healthy()

    def rank_flag(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Returns whether a copy is due on this rank because of the time."""
        manager = None if self._fit is None else self._fit.manager
        return float(manager is not None and manager.waited_long)

    def on_rank_flags(
        self, trainer: Trainer, pl_module: LightningModule, flags: Sequence[float]
    ) -> None:
        """Takes over that a copy is due on any rank."""
        if any(flags) and self._fit is not None and self._fit.manager is not None:
            self._fit.manager.time_is_up()

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Discards a copy that is not confirmed."""
        if incident.anomaly.warn_only:
            return
        if self._fit is not None and self._fit.manager is not None:
            self._fit.manager.discard()

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discards a copy that is not confirmed; counts from the step rolled back to."""
        if self._fit is not None and self._fit.manager is not None:
            self._fit.manager.rolled_back()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a resume, completes the epoch's aggregates and reports the result."""
        if self._fit is not None:
            self._fit.epoch.add(trainer)
            self._fit.verification.after_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clears the aggregates of the epoch."""
        if self._fit is not None:
            self._fit.epoch.forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the newest confirmed state, and waits until the last file is written."""
        if self._fit is not None:
            self._fit.end("finished", together=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes the newest confirmed state, and records how the run ended."""
        if self._fit is None:
            return
        # Lightning ends a fit at SIGTERM with a subclass of SystemExit.
        interrupted = isinstance(exception, (KeyboardInterrupt, SystemExit))
        reason = f"{type(exception).__name__}: {exception}".splitlines()[0][:500]
        # Other ranks may be anywhere.
        together = trainer.world_size == 1
        self._fit.end(
            "interrupted" if interrupted else "failed",
            reason,
            together=together,
            in_a_hurry=isinstance(exception, SIGTERMException),
        )
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves trainer and memory as they were before the fit."""
        if stage == "fit":
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """Returns data position, RNG states and the epoch's aggregates; {} outside a fit."""
        position = {} if self._fit is None else self._fit.position.state_dict()
        if self._fit is None or not position:
            return {}
        epoch = EpochMetrics.state_dict(self._fit.trainer, epoch_over=position["epoch_over"])
        return {
            "position": position,
            "epoch": epoch,
            "between_batches": self._capturing,
            "rank": self._fit.trainer.global_rank,
            "world_size": self._fit.trainer.world_size,
            "time": time.time(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keeps the state until training starts."""
        self._restored = state_dict

    def rescale_batch_counts(self, state: dict[str, Any], micro_batches: int) -> None:
        """Changes a state in place, after each batch was split into micro-batches.

        Args:
            state: what `state_dict` returned.
            micro_batches: how many there are for each former batch.
        """
        position = state.get("position")
        if position is None:
            return
        position["batches"] *= micro_batches
        if position.get("samples_per_batch"):
            position["samples_per_batch"] //= micro_batches
        position["states"] = {i * micro_batches: s for i, s in position["states"].items()}
        # The former batch may not fit into memory, and its loss is not that of a micro-batch.
        state.pop("kept", None)

    def checkpoint(self, trainer: Trainer) -> dict[str, Any]:
        """Returns Lightning's checkpoint between two batches; it aliases the live tensors.

        All ranks must call it, or none; each gets its part.
        """
        self._capturing = True
        try:
            with monitor_of(trainer).unchecked_save():
                return full_checkpoint(trainer) if trainer.world_size == 1 else of_rank(trainer)
        finally:
            self._capturing = False

    def save_of_ranks(self, trainer: Trainer, path: Path) -> bool:
        """Saves a checkpoint of all ranks between two batches, from which each resumes exactly.

        All ranks must call it, or none.

        Args:
            trainer: in its fit.
            path: of the folder, the same on all ranks.

        Returns:
            Whether it was saved: not on one device, nor where this callback keeps nothing.

        Raises:
            OSError: on all ranks, if one cannot write.
        """
        manager = None if self._fit is None else self._fit.manager
        if manager is None or not isinstance(manager.writer, RankCheckpointWriter):
            return False
        manager.writer.write_now(self.checkpoint(trainer), path)
        return True

    def _release(self) -> None:
        if self._fit is not None:
            self._fit.verification.close()
            self._fit.position.detach()
            if self._fit.ranks is not None:
                self._fit.ranks.close()
        self._fit = None


class _Fit:
    """The state of one fit."""

    def __init__(self, owner: LastKnownGood, trainer: Trainer, pl_module: LightningModule) -> None:
        self.owner, self.trainer, self.module = owner, trainer, pl_module
        self.position = DataPosition(self._between_batches, owner)
        self.position.attach(trainer)
        self.epoch = EpochMetrics()
        self.verification = ResumeVerification(None, owner.on_mismatch, gather_of(trainer))
        self.ranks: Ranks | None = None
        """The communicator of the threads that write, on several ranks."""
        self.previous: PreviousRun | None = None
        self.manager: CheckpointManager | None = None
        self._begun = False

    def start(self, restored: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> None:
        """Prepares the writer, and a resume if there is a restored state."""
        directory, owner = run_directory(self.trainer), self.owner
        if directory is not None:
            self.manager = CheckpointManager(
                self.trainer,
                self.module,
                self._writer(directory / FOLDER),
                gather_of(self.trainer),
                owner.state_key,
                every_n_steps=owner.every_n_steps,
                confirm_after=owner.confirm_after,
                max_batch_bytes=owner.max_batch_bytes,
                every_n_seconds=owner.every_n_seconds,
            )
        elif not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info(
                "LastKnownGood keeps nothing, and incidents are not recorded: %s; give the Trainer "
                "a local default_root_dir",
                why_no_directory(self.trainer),
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
            self._resume(restored, buffers)

    def _writer(self, folder: Path) -> AsyncCheckpointWriter:
        if self.trainer.world_size == 1:
            return AsyncCheckpointWriter(folder, self.owner.keep)
        self.ranks = Ranks(replicas=sharing(self.trainer) == "replicas", overlapped=False)
        return RankCheckpointWriter(folder, self.owner.keep, self.ranks)

    def _resume(self, restored: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> None:
        trainer = self.trainer
        written_by = (restored.get("rank", 0), restored.get("world_size", 1))
        own = written_by == (trainer.global_rank, trainer.world_size)
        if not own:
            log_other_ranks(trainer, written_by[1])
        self.position.resume(
            restored["position"],
            between_batches=restored["between_batches"],
            ranks_then=None if own else written_by[1],
        )
        if own:
            restore_buffers(self.module, buffers)
            kept, mismatch = restored.get("kept"), self.owner.on_mismatch
            self.verification = ResumeVerification(kept, mismatch, gather_of(trainer))
            self.epoch.resume(trainer, restored["epoch"])

    def _between_batches(self) -> None:
        if not self._begun:
            self.verification.before_first_batch(self.trainer, self.module)
            if self.manager is not None and self.previous is not None:
                self.previous.clear(self.manager.writer.folder)
            self._begun = True
            self._record_state("running")
        if self.manager is not None:
            self.manager.between_batches(lambda: self.owner.checkpoint(self.trainer))

    def end(
        self, state: State, reason: str = "", *, together: bool, in_a_hurry: bool = False
    ) -> None:
        """Writes what is confirmed; records how the fit ended, if it had begun.

        Args:
            state: in which the fit ended.
            reason: the exception, if there was one.
            together: whether all ranks are here.
            in_a_hurry: whether the process may be killed soon.
        """
        if self.manager is not None:
            self.manager.close(together=together)
            if together and self._begun and not in_a_hurry:
                manager = self.manager
                guarded(
                    self,
                    "the newest confirmed state cannot be written",
                    lambda: self._write_confirmed(manager),
                )
        if self._begun:
            self._record_state(state, reason)

    def _write_confirmed(self, manager: CheckpointManager) -> None:
        """Writes the newest confirmed snapshot, if it is newer than the last copy."""
        callbacks = callbacks_of(self.trainer)
        rollback = next((c for c in callbacks if isinstance(c, AutoRollback)), None)
        step = None if rollback is None else rollback.confirmed_step
        if rollback is None or step is None or step <= (manager.last or 0):
            return
        write = None
        with rollback.at_confirmed_step() as following:
            if following is not None and self.position.can_return_to(following[0]):
                with self.position.before_batch(*following):
                    write = manager.write_now(self.owner.checkpoint(self.trainer))
        if write is not None:
            write()

    def _record_state(self, state: State, reason: str = "") -> None:
        if self.manager is not None and self.previous is not None:
            writer = self.manager.writer
            self.previous.note(writer.folder, writer.newest, state, reason)
