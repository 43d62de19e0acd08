"""Takes a fit back, to the start of a step or to a snapshot, with or without its data."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_stability.callbacks.hooks import implements
from lit_stability.trainer_internals import (
    BatchRecorder,
    CheckpointLedger,
    RecordedBatch,
    ReplayRing,
    SchedulerPause,
    Stateful,
    StepSkipper,
    StepStart,
    TrainingSnapshot,
    callbacks_of,
    count_skipped_batches,
)
from lit_stability.training_state.frozen_weights import FrozenWeights
from lit_stability.training_state.snapshot_rotation import SnapshotRotation

log = logging.getLogger("lightning.pytorch.lit_stability")

_WRITTEN_INTO = (
    "training_step writes into its batch, so that it cannot be replayed: pass "
    "AutoRollback(clone_batches=True)"
)


class RollbackEngine:
    """What lives as long as one fit: snapshots, batches kept, and what a rejected step spoils.

    Args:
        trainer: in its fit.
        pl_module: the module in training.
        confirm_after: healthy steps after which a snapshot may be gone back to.
        snapshot_every: healthy steps between snapshots.
        replay: whether data are to be replayed, where that is possible.
        max_ring_bytes: bound on the batches kept.
        clone: keep copies of the batches.
        registered: objects whose state belongs to the snapshot.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        confirm_after: int,
        snapshot_every: int,
        replay: bool,
        max_ring_bytes: int,
        clone: bool,
        registered: Sequence[Stateful],
    ) -> None:
        self._trainer, self._module, self._registered = trainer, pl_module, registered
        self._every = snapshot_every
        self._since = 0
        self.ring = ReplayRing(max_ring_bytes, clone)
        self.recorder = BatchRecorder(trainer, self.ring, self._before_fetch)
        self.recorder.attach()
        self.replay = replay and self.recorder.can_replay
        if replay and not self.replay:
            log.info(
                "training_step draws from dataloader_iter: data are not replayed, only skipped"
            )
        self._frozen = FrozenWeights()
        self.snapshots = SnapshotRotation(
            lambda: TrainingSnapshot(pl_module, self._frozen), confirm_after
        )
        self._ledger = CheckpointLedger(trainer)
        self._ledger.attach()
        self._start = StepStart(pl_module)
        self._pause = SchedulerPause()
        self._skipper = StepSkipper(trainer, self._pause)
        self._finish: StepStart | TrainingSnapshot | None = None
        self._told: set[str] = set()
        self.snapshots_paused = False
        """Whether no new snapshot is to be taken for now."""
        self._has_extra = bool(registered) or any(
            implements(owner, "rewindable_state")
            and not getattr(owner, "ignores_skipped_steps", False)
            for owner in [*callbacks_of(trainer), pl_module]
        )
        self._begin_window()

    def _begin_window(self) -> None:
        """Forget what happened since the last optimizer step."""
        self._window_is_new = True
        self.stepped = False
        self._accepted = 0
        self._skipper.forget()

    def close(self) -> None:
        """Leave the trainer as it was found."""
        self._pause.end()
        self.recorder.detach()
        self._ledger.detach()

    def _before_fetch(self) -> None:
        self._pause.end()
        if self._finish is not None:
            # Hooks of the rejected batch that came after the rewind have moved these again.
            if isinstance(self._finish, TrainingSnapshot):
                self._finish.restore_callback_state()
            self._finish.loops.restore_at_fetch(self._trainer)
            self._finish = None
        if not self._window_is_new:
            return
        self._window_is_new = False
        position = self.ring.position
        first = self.snapshots.confirmed is None
        due = self._since >= self._every and self.snapshots.ready and not self.snapshots_paused
        if first or due:
            self._take_snapshot(position)
        if first:
            self.snapshots.confirm_now()
        self._start.capture(self._trainer, position=position)

    def _take_snapshot(self, position: int) -> None:
        snapshot = self.snapshots.begin()
        oldest = self.snapshots.oldest
        if oldest is not None:
            self.ring.prune(oldest.position)
            self._ledger.commit(oldest.mark)
        snapshot.capture(
            self._trainer,
            self._module,
            position=position,
            mark=self._ledger.mark,
            registered=self._registered,
        )
        self._since = 0
        if oldest is None:
            frozen = self._frozen.nbytes / 2**20
            self._tell_once(
                f"AutoRollback holds two snapshots, {snapshot.nbytes / 2**20:.1f} MiB each"
                + (f", and once {frozen:.1f} MiB of frozen weights" if frozen else "")
            )
        elif self.replay and "ring" not in self._told:
            self._told.add("ring")
            self._tell(
                f"AutoRollback keeps {position - oldest.position} batches to replay, "
                f"{self.ring.nbytes / 2**20:.1f} MiB of at most {self.ring.max_bytes / 2**20:.0f}"
            )

    def batch_started(self) -> None:
        """Note to which optimizer step the batch belongs."""
        if self.ring.entries:
            self.ring.entries[-1].step = self._trainer.global_step

    def healthy(self) -> None:
        """Count an accepted step, at the end of its batch: another rank may turn out to object."""
        self.stepped = True
        self._accepted += 1

    def skip_step(self, optimizer: Optimizer) -> None:
        """Keep an optimizer from the step it is about to take."""
        self._skipper.take(optimizer, epoch=self.replay)

    @property
    def window(self) -> list[RecordedBatch]:
        """The batches of the step being taken."""
        return self.ring.since(self._start.position) if self.replay else []

    def can_retry(self, leave_out: Collection[RecordedBatch] = ()) -> bool:
        """Whether the step being taken can be taken again, without some of its batches."""
        if not self.replay:
            return False
        self.ring.check_modified()
        position = self._start.position
        if self._must_go_further:
            assert self.snapshots.confirmed is not None
            position = self.snapshots.confirmed.position
        return self._replayable(position, leave_out)

    def can_replay(self, snapshot: TrainingSnapshot) -> bool:
        """Whether everything since a snapshot can be trained on again."""
        if not self.replay:
            return False
        self.ring.check_modified()
        return self._replayable(snapshot.position)

    def _replayable(self, position: int, leave_out: Collection[RecordedBatch] = ()) -> bool:
        found = self.ring.replayable(position, leave_out)
        if not found and position < self.ring.first:
            self._tell_once(
                "the batches since the snapshot are more than max_ring_bytes="
                f"{self.ring.max_bytes}: they are skipped, not replayed"
            )
        elif not found:
            self._tell_once(_WRITTEN_INTO)
        return found

    @property
    def _must_go_further(self) -> bool:
        """Whether more than a step's own traces have to be undone: only a snapshot has it all."""
        return self.stepped or self._has_extra

    def snapshot_for(self, step: int, *, older: bool) -> TrainingSnapshot:
        """The newest confirmed snapshot from before a step, or the one before it."""
        found = self.snapshots.confirmed
        assert found is not None
        before = self.snapshots.older
        return before if before is not None and (older or found.step > step) else found

    def to_step_start(self, leave_out: Collection[RecordedBatch]) -> None:
        """Take the step back, and serve its batches again, but for those left out."""
        if self._must_go_further:
            assert self.snapshots.confirmed is not None
            self.to_snapshot(self.snapshots.confirmed, leave_out)
            return
        start = self._start
        self._pause.undo()
        start.restore(self._trainer)
        self._skipper.restore()
        self._rewind(start, leave_out, same_step=True)

    def drop_step(self) -> None:
        """Take the step back, and go on with the next batch."""
        self._pause.undo()
        self._start.restore(self._trainer)
        self._skipper.restore()
        self._pause.hide(self._trainer, same_step=True)

    def to_snapshot(self, snapshot: TrainingSnapshot, leave_out: Collection[RecordedBatch]) -> None:
        """Put a snapshot back, and serve the batches since then, but for those left out."""
        self._restore(snapshot, replay=True)
        self._rewind(snapshot, leave_out, same_step=False)

    def to_snapshot_only(self, snapshot: TrainingSnapshot) -> None:
        """Put a snapshot back, and go on with the next batch; the step count goes back."""
        self._restore(snapshot, replay=False)
        snapshot.steps.restore(self._trainer)
        self._pause.hide(self._trainer, same_step=False)
        # It will be taken anew before the next batch, as data and loops have gone on.
        self.snapshots.restart()

    def _restore(self, snapshot: TrainingSnapshot, *, replay: bool) -> None:
        self.snapshots.discard()
        if snapshot is self.snapshots.older:
            self.snapshots.go_back()
        self._since = 0
        for path in self._ledger.go_back(snapshot.mark):
            self._tell(f"written since the snapshot, renamed: {path}")
        self._pause.forget()
        snapshot.restore(self._trainer, replay=replay)

    def _rewind(
        self,
        to: StepStart | TrainingSnapshot,
        leave_out: Collection[RecordedBatch],
        *,
        same_step: bool,
    ) -> None:
        epoch = to.loops.epoch
        self.recorder.rewind(to.position, epoch, leave_out)
        more = self.recorder.more_in(epoch)
        to.loops.restore_at_batch_end(self._trainer, more=more)
        self._pause.hide(self._trainer, same_step=same_step)
        self._finish = to if more else None
        if not more:
            self._pause.release_epoch()
            loop = self._trainer.fit_loop.epoch_loop
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
            count_skipped_batches(self._trainer, self.ring.left_out[epoch])

    def batch_ended(self) -> None:
        """After an accepted batch, or after whatever was done about a rejected one."""
        self.ring.check_modified()
        if self.replay and self.ring.position == 1 and self.ring.entries[0].modified:
            self._tell_once(_WRITTEN_INTO)
        if not self._skipper.active:
            count_skipped_batches(self._trainer, self.ring.left_out[self._trainer.current_epoch])
            self._since += self._accepted
            for _ in range(self._accepted):
                self.snapshots.healthy()
        if self._skipper.active or self.stepped:
            self._begin_window()

    def epoch_ended(self) -> None:
        """No batch is fetched any more in this epoch."""
        self._pause.end()

    def _tell(self, line: str) -> None:
        if self._trainer.is_global_zero:
            log.info(line)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._tell(line)
