"""Undoes a step, or restores a snapshot, with or without the data since then.

May import Lightning.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_stability.callbacks.auto_rollback.memory_use import MemoryUse
from lit_stability.callbacks.auto_rollback.snapshot_store import SnapshotStore
from lit_stability.callbacks.auto_rollback.snapshot_timer import SnapshotTimer
from lit_stability.callbacks.hooks import implements
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import Callback, LightningModule, Trainer
from lit_stability.measurement.number_formats import which_are_finite
from lit_stability.measurement.tensor_tree import tensors_in
from lit_stability.policies.snapshot_cadence import SnapshotCadence
from lit_stability.trainer_internals import (
    BatchRecorder,
    CheckpointLedger,
    PlainAttributes,
    RecordedBatch,
    ReplayRing,
    SchedulerPause,
    Stateful,
    StepSkipper,
    StepStart,
    TrainingSnapshot,
    callbacks_of,
    count_skipped_batches,
    end_epoch_schedulers,
    has_room_to_move,
    in_earlier_state,
    keeps_state,
    move_batch_index,
    owners_in,
    remove_gradients,
    sharing,
)
from lit_stability.training_state.frozen_weights import FrozenWeights
from lit_stability.training_state.rng import capture_rng, fresh_rng, restore_rng, same_rng
from lit_stability.training_state.snapshot_memory import Where
from lit_stability.training_state.weight_writes import WeightWrites

log = suite_logger()

_COPIES = "training_step changes its batch: a copy of each batch is kept from now on"
_MODIFIED = (
    "a batch that training_step has changed cannot be replayed, as no copy of it was kept: pass "
    "AutoRollback(clone_batches=True)"
)
_COPIED = 2**26
"""Bytes of weights that the program writes, up to which they are copied for every step. Beyond it a
step is undone by way of the last snapshot."""
_BEFORE_UPDATE = "in training_step or another hook before the update"
_AFTER_UPDATE = "in a hook after the update, such as on_train_batch_end"
_FIRST_STEP = (
    "DDP sums the gradients of the first step in another order when it is run again: with three "
    "ranks or more the last bits may differ"
)
_KEPT = (
    "attributes of callbacks are not rolled back: {}. A callback that has state_dict and "
    "load_state_dict, or rewindable_state and load_rewindable_state, is"
)


def has_nonfinite(batch: object) -> bool:
    """Returns whether a batch holds a NaN or Inf."""
    return not all(which_are_finite(tensors_in(batch)))


class RollbackEngine:
    """The snapshots, the recorded batches and the undo information of one fit.

    Args:
        trainer: in its fit.
        pl_module: the module in training.
        confirm_after: healthy steps after which a snapshot is confirmed.
        cadence: healthy steps between snapshots.
        replay: whether batches are replayed after a rollback, where that is possible.
        max_replay_bytes: bound on the batches kept.
        clone: keep copies of the batches.
        registered: further objects whose state belongs to the snapshot.
        snapshot_device: where snapshots are kept.
        memory_budget: bytes that snapshots, batches and other copies may take; None for no bound.
        gather: returns a value of each rank; all ranks call it, or none.
        owner: the callback; nothing is recorded while a tuner has replaced it.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        confirm_after: int,
        cadence: SnapshotCadence,
        replay: bool,
        max_replay_bytes: int,
        clone: bool,
        registered: Sequence[Stateful],
        snapshot_device: Where,
        memory_budget: int | None,
        gather: Callable[[Any], list[Any]],
        owner: Callback,
    ) -> None:
        self._trainer, self._module, self._registered = trainer, pl_module, registered
        self._confirm_after = confirm_after
        self._since = self._draws = self._taken = 0
        self._stepped = False
        """Whether a step of this fit was accepted, so that it is known what one needs."""
        self._ring = ReplayRing(max_replay_bytes, clone)
        self._recorder = BatchRecorder(trainer, self._ring, self._before_fetch, owner)
        self._recorder.attach()
        self.replay = replay and self._recorder.can_replay
        if replay and not self.replay:
            log.info("training_step draws from dataloader_iter: batches are skipped, not replayed")
        self._frozen = FrozenWeights()
        self._store = SnapshotStore(
            lambda: TrainingSnapshot(pl_module, self._frozen),
            confirm_after=confirm_after,
            where=snapshot_device,
            device=trainer.strategy.root_device,
            budget=memory_budget,
            gather=gather,
            sharers=trainer.num_devices,
        )
        self.memory = MemoryUse(
            trainer, pl_module, self._store, self._ring, self._frozen, memory_budget
        )
        self.cadence = cadence
        self._timer = SnapshotTimer(
            cadence, trainer.strategy.root_device, self._store.finish, gather
        )
        self._ledger = CheckpointLedger(trainer)
        self._ledger.attach()
        self._start = StepStart(trainer, pl_module)
        # Shards are gathered and freed within a step: writes to them are not watched.
        watched = nn.Module() if sharing(trainer) == "shards" else pl_module
        self._writes = WeightWrites(
            watched, trainer.optimizers, lambda optimizer: self._skipper.skips(optimizer)
        )
        self._optimizer_count = len(trainer.optimizers)
        self._pause = SchedulerPause()
        self._skipper = StepSkipper(trainer, self._pause)
        self._finish: StepStart | TrainingSnapshot | None = None
        self._undone = False
        """Whether the last batch was undone, so that its gradients must not be added to."""
        self._hooks_have_ended = True
        """Whether all hooks of the last batch have run; also before the first batch."""
        self._undone_to: StepStart | TrainingSnapshot | None = None
        """What the last batch was undone to, while further hooks of that batch run."""
        owners = owners_in(trainer, pl_module, of_torch=False)
        self._before_undo, self._after_undo = PlainAttributes(owners), PlainAttributes(owners)
        """Values in attributes of the module."""
        self._redrawn: int | None = None
        """The step that is retried with other random numbers, until its first batch is fetched."""
        self._moved: int | None = None
        """The step that is retried at the next batch index, until its first batch is fetched."""
        self._rng: dict[str, Any] = {}
        """Of the generators after the undo."""
        self._logged: set[str] = set()
        self.snapshots_paused = False
        """Whether no new snapshot is taken for now: the steps since the last are being checked."""
        self._has_extra = bool(registered) or any(
            (implements(owner, "rewindable_state") or keeps_state(owner))
            and not getattr(owner, "ignores_skipped_steps", False)
            for owner in [*callbacks_of(trainer), pl_module]
        )
        self._many_replicas = sharing(trainer) == "replicas" and trainer.world_size > 2
        self._order_changes = self._many_replicas
        """Whether DDP is going to sum the gradients in another order."""
        self._begin_window()

    def _begin_window(self) -> None:
        """Clear what happened since the last optimizer step."""
        self._window_is_new = True
        self.stepped = False
        """Whether an optimizer has stepped in this window."""
        self._cut_short = False
        self._accepted = 0
        self._wrote = False
        """Whether the program wrote weights that the start of the window has no copy of."""
        self._too_large = False
        """Whether that is so as they are too many."""
        self._skipper.forget()

    def close(self) -> None:
        """Leaves the trainer as it was before the fit."""
        self._pause.end()
        self._store.close()
        self._writes.close()
        self._recorder.detach()
        self._ledger.detach()

    def attach_to_data(self) -> None:
        """Records the batches of the trainer's present loader."""
        self._recorder.attach()

    @property
    def confirmed(self) -> TrainingSnapshot | None:
        """The newest confirmed snapshot."""
        return self._store.rotation.confirmed

    @contextlib.contextmanager
    def at_confirmed(self) -> Iterator[tuple[int, int] | None]:
        """Has the fit in the state of the newest confirmed snapshot while a ``with`` block runs.

        To be used when the fit has ended, or has failed.

        Yields:
            Epoch of the next batch in that state, and its index in the epoch; None if the fit stays
            in its present state, as there is no memory to go back to it, the batches since then
            are not known, or the module has other parameters or buffers now.
        """
        confirmed = self.confirmed
        if (
            confirmed is None
            or not self._ring.first <= confirmed.position < self._ring.position
            or confirmed.crosses_change_of_groups(self._trainer)
        ):
            yield None
            return
        self._store.wait()
        present = self._store.capture_present(
            functools.partial(self._capture, position=self._ring.position)
        )
        if present is None or not present.module.has_same_layout(confirmed.module):
            yield None
            return
        following = self._ring.since(confirmed.position)[0]
        with in_earlier_state(self._trainer, confirmed, present):
            yield following.epoch, following.index

    @property
    def has_older_snapshot(self) -> bool:
        """Whether the snapshot before the newest confirmed one is still there."""
        return self._store.rotation.older is not None

    @property
    def kept_batches(self) -> int:
        """Batches that are kept to be replayed."""
        return len(self._ring.entries)

    def batches_since(self, snapshot: TrainingSnapshot) -> list[RecordedBatch]:
        """Returns the batches that were served since a snapshot."""
        return self._ring.since(snapshot.position)

    def outlier(self) -> tuple[str, float, int] | None:
        """Returns a parameter with an element that moved further than training can explain.

        Returns:
            Name of the parameter, how far the element moved, and the step of the snapshot that it
            is compared with; None if there is no such element, or no snapshot.
        """
        confirmed = self.confirmed
        found = None if confirmed is None else confirmed.module.outlier()
        return None if confirmed is None or found is None else (*found, confirmed.step)

    def _before_fetch(self) -> None:
        self._pause.end()
        if self._undone and not self._module.automatic_optimization:
            for optimizer in self._trainer.optimizers:
                remove_gradients(optimizer)
        self._undone = False
        if self._undone_to is not None:
            self._restore_again()
            restore_rng(self._rng)
        self._recorder.restore_rng_before_next()
        if not self._hooks_have_ended:
            self._find_writes()
        self._hooks_have_ended = False
        self._follow_optimizers()
        if len(self._trainer.optimizers) != self._optimizer_count:
            # No snapshot has the state of those that there are now.
            self._optimizer_count, self._window_is_new = len(self._trainer.optimizers), True
            self._store.rotation.restart()
        if self._finish is not None:
            self._finish.loops.restore_at_fetch(self._trainer)
            self._finish = None
        if self._recorder.interrupted:
            self._recorder.interrupted, self._window_is_new = False, True
            self._store.rotation.restart()
        if not self._window_is_new:
            return
        self._window_is_new = False
        self._timer.step_ended()
        position = self._ring.position
        first = self.confirmed is None or self._order_is_final()
        due = (
            self._since >= self.cadence.distance
            and self._store.rotation.ready
            and not self.snapshots_paused
        )
        if self._store.keeps_none:
            self._ring.prune(position)
        elif first or due:
            self._take_snapshot(position, confirm=first)
        written = self._writes.written
        self._too_large = sum(p.nbytes for p in written) > _COPIED
        copied = () if self._too_large else written
        self._start.capture(self._trainer, position=position, written=copied)
        if self._redrawn is not None and self._redrawn <= self._trainer.global_step:
            self._before_undo.restore(flags_only=True)
            self._redrawn = None
        if self._moved is not None and self._moved <= self._trainer.global_step:
            move_batch_index(self._trainer)
            self._moved = None
        compared = self._sample_is_due() if first or due else False
        self._writes.begin(samples=compared or self._store.is_copying)
        self._timer.step_begins()

    def _order_is_final(self) -> bool:
        """Whether DDP has just fixed the order in which it sums the gradients.

        Before its second forward pass it puts them into other buckets. With three ranks or more the
        sums of the first step cannot be repeated bit by bit, so nothing goes back before it.
        """
        if not self._order_changes or self._trainer.global_step == 0:
            return False
        self._order_changes = False
        return True

    def _warn_of_first_step(self, undone_to: StepStart | TrainingSnapshot) -> None:
        if self._many_replicas and undone_to.position == 0:
            self._log_once(_FIRST_STEP)

    def _sample_is_due(self) -> bool:
        """Whether the elements of weights are compared: ever more rarely, as that takes time."""
        self._taken += 1
        return self._taken & (self._taken - 1) == 0

    def hooks_ended(self) -> None:
        """Ends the watch over the hooks of a batch, as an epoch ends or is validated now.

        What is written from now on, such as averaged weights that are swapped in for a validation,
        belongs to no step.
        """
        if not self._hooks_have_ended:
            self._find_writes()
            self._restore_again()
        self._hooks_have_ended = True

    def _restore_again(self) -> None:
        """Restores again what hooks of an undone batch have changed after it was undone."""
        undone_to, self._undone_to = self._undone_to, None
        if undone_to is None:
            return
        self._find_writes()
        undone_to.restore_again()
        self._writes.begin()
        self._after_undo.restore()

    def measured(self) -> None:
        """Looks for weights that the program has written in this step, before their update."""
        self._wrote = self._find_writes(_BEFORE_UPDATE) or self._wrote
        # A hook may have replaced the optimizer since the batch was fetched.
        self._follow_optimizers()

    def _follow_optimizers(self) -> None:
        """Watches the steps of the optimizers that the Trainer has now."""
        self._writes.follow(self._trainer.optimizers)
        self._store.follow(self._trainer.optimizers)

    def _find_writes(self, place: str = _AFTER_UPDATE) -> bool:
        found = self._writes.check()
        if found:
            self._store.program_wrote()
        if found and "writes" not in self._logged:
            self._logged.add("writes")
            names = {id(p): name for name, p in self._module.named_parameters()}
            first = ", ".join(names.get(id(p), "a parameter") for p in self._writes.written[:3])
            more = len(self._writes.written) - 3
            self._log(
                f"the program writes {first}{f' and {more} more' if more > 0 else ''} itself, "
                f"{place}: a step that is undone restores such weights too"
            )
        return found

    def _take_snapshot(self, position: int, *, confirm: bool) -> None:
        if self.confirmed is not None:
            changed = self.confirmed.owners_changed()
            for attributes in (self._start.attributes, self._before_undo, self._after_undo):
                attributes.watch(changed)

        take = functools.partial(self._capture, position=position)
        self.memory.measure_batches()
        capture = functools.partial(
            self._store.capture, self.memory.needs, take, confirm=confirm, stepped=self._stepped
        )
        if self._timer.take(capture, self._room_for_batches):
            self._log(self.cadence.change())
        self.memory.bound_batches()
        self._since = 0
        oldest = self._store.rotation.oldest
        if oldest is not None:
            self._ring.prune(oldest.position)
            self._ledger.commit(oldest.mark)
        if (line := self.memory.news()) is not None:
            self._log(line)

    def _capture(self, snapshot: TrainingSnapshot, *, position: int) -> None:
        snapshot.capture(
            self._trainer,
            self._module,
            position=position,
            mark=self._ledger.mark,
            registered=self._registered,
            written=self._writes.written,
        )

    def _room_for_batches(self) -> float:
        """Returns the largest distance between snapshots at which all batches can be replayed.

        The batches since the older snapshot are kept until a newer one is confirmed.
        """
        confirmed, ring = self.confirmed, self._ring
        if not self.replay or confirmed is None or not ring.entries:
            return math.inf
        batches_per_step = (ring.position - confirmed.position) / max(1, self._since)
        bytes_per_step = batches_per_step * ring.nbytes / len(ring.entries)
        return (ring.max_bytes / max(1.0, bytes_per_step) - self._confirm_after) / 2

    def startup_text(self) -> str:
        """Returns what is kept in memory and how often it is taken, in a few words."""
        if self._store.keeps_none:
            return "no snapshot"
        return f"{self.memory.startup_text()}, one every {self.cadence.in_words()}"

    def batch_started(self) -> None:
        """Records to which optimizer step the batch belongs."""
        if self._ring.entries:
            self._ring.entries[-1].step = self._trainer.global_step

    def healthy(self) -> None:
        """Counts an accepted step; it is final at the end of its batch, when all have voted."""
        self.stepped = True
        self._accepted += 1

    def skip_step(self, optimizer: Optimizer) -> None:
        """Skips the step that an optimizer is about to take."""
        self._skipper.skip(optimizer, epoch=self.replay, counted=not self._cut_short)

    @property
    def current_batch(self) -> RecordedBatch:
        """The batch that is being trained on."""
        return self._ring.entries[-1]

    def recent_batches(self) -> tuple[list[Any], int]:
        """Returns the raw batches that are kept, the present one last.

        Also returned is the index of the first that is of the same epoch.
        """
        kept = self._ring.entries
        if not kept or kept[-1].modified or not isinstance(kept[-1].item, tuple):
            return [], 0
        entries = [each for each in kept if not each.modified]
        first = next(i for i, e in enumerate(entries) if e.epoch == entries[-1].epoch)
        return [each.item[0] for each in entries], first

    @property
    def records_batches(self) -> bool:
        """False if the module fetches its batches itself."""
        return self._recorder.can_replay

    def cut_short(self) -> bool:
        """Has the current batch undone from a snapshot: weights may have changed within it.

        Returns:
            Whether that is possible; if not, nothing was changed.
        """
        before, self.stepped = self.stepped, True
        self._cut_short = self.can_retry()
        self.stepped = before or self._cut_short
        return self._cut_short

    def damaged_in_this_step(self) -> tuple[str, ...]:
        """Returns the non-finite weights if all of them were finite at the start of this step.

        That is known of weights that the program writes itself.
        """
        if not self._writes.written:
            return ()
        named = dict(self._module.named_parameters())
        finite = which_are_finite(named.values())
        bad = {name: named[name] for name, ok in zip(named, finite, strict=True) if not ok}
        return tuple(bad) if self._start.had_finite(bad.values()) else ()

    def damaged_buffers(self) -> tuple[str, ...]:
        """Returns buffers that were non-finite before this step and are finite in a snapshot."""
        if self.confirmed is None:
            return ()
        before = self.confirmed.module.non_finite_buffers()
        damaged = self._start.non_finite_buffers() - before
        names = {id(module): name for name, module in self._module.named_modules()}
        found = (f"{names.get(owner, '')}.{key}".lstrip(".") for owner, key in damaged)
        return tuple(sorted(found))

    @property
    def window(self) -> list[RecordedBatch]:
        """The batches of the current step."""
        return self._ring.since(self._start.position) if self.replay else []

    def can_retry(self, skipped: Collection[RecordedBatch] = ()) -> bool:
        """Returns whether the current step can be retried, without some of its batches."""
        if not self.replay:
            return False
        self._ring.check_modified()
        position = self._start.position
        if self._needs_snapshot:
            if self.confirmed is None:
                return False
            position = self.confirmed.position
        return self._replayable(position, skipped)

    def can_replay(self, snapshot: TrainingSnapshot) -> bool:
        """Returns whether all batches since a snapshot can be trained on again."""
        if not self.replay:
            return False
        self._ring.check_modified()
        return self._replayable(snapshot.position)

    def _replayable(self, position: int, skipped: Collection[RecordedBatch] = ()) -> bool:
        found = self._ring.replayable(position, skipped)
        if not found and position < self._ring.first:
            self._log_once(
                f"the batches since the snapshot take more than {self.memory.bound_on_batches}: "
                "they are skipped, not replayed"
            )
        elif not found:
            self._log_once(_MODIFIED)
        return found

    @property
    def _needs_snapshot(self) -> bool:
        """Whether more than the current step's own changes must be undone.

        Updates of another optimizer in the same window, and extra state of callbacks, are in a
        snapshot only, and so are weights that the program wrote for the first time.
        """
        return self.stepped or self._has_extra or self._wrote or self._too_large

    def snapshot_for(self, step: int, *, older: bool) -> TrainingSnapshot:
        """Returns the newest confirmed snapshot from before a step, or the one before it."""
        found = self.confirmed
        assert found is not None
        before = self._store.rotation.older
        return before if before is not None and (older or found.step > step) else found

    def to_step_start(self, skipped: Collection[RecordedBatch]) -> bool:
        """Undoes the current step and serves its batches again, except those to skip.

        Returns:
            Whether a snapshot was restored, so that steps before it are replayed too.
        """
        self.measured()
        confirmed = self.confirmed
        if (
            self._needs_snapshot
            and confirmed is not None
            and self._replayable(confirmed.position, skipped)
        ):
            self.to_snapshot(confirmed, skipped)
            return True
        self._undo_step()
        self._rewind(self._start, skipped, same_step=True)
        return False

    def _undo_step(self) -> None:
        self._store.wait()
        self._before_undo.capture()
        self._warn_of_first_step(self._start)
        self._undone, self._undone_to = True, self._start
        self._pause.undo()
        self._start.restore(self._trainer)
        self._writes.begin()
        self._skipper.restore()

    def may_fail_by_chance(self) -> bool:
        """Returns whether the step may end otherwise with the same batches.

        It drew random numbers, or changed counters or flags of the module. A batch that holds a NaN
        needs no such reason.
        """
        if self._batch_is_bad():
            return False
        return self._drew_random_numbers() or bool(self._start.attributes.changed(flags_only=True))

    def _batch_is_bad(self) -> bool:
        return any(has_nonfinite(each.item) for each in self.window)

    def _drew_random_numbers(self) -> bool:
        entry = self._ring.entries[-1] if self._ring.entries else None
        if entry is None or entry.rng is None:
            return True
        return not same_rng(entry.rng, capture_rng())

    def redraw(self, step: int) -> None:
        """Has a step that was undone draw other random numbers than before.

        Counters and flags of the module, by which it may choose what to do, go on too.
        """
        self._redrawn = step
        self._draws += 1
        if self._ring.queue:
            self._ring.redraw(step, self._draws)
        else:
            self._ring.resume = fresh_rng(self._ring.resume or capture_rng(), self._draws)

    def can_move_index(self) -> bool:
        """Returns whether the current step can be retried at the batch index after its own.

        A batch that holds a NaN fails at any.
        """
        room = self.replay and has_room_to_move(self._trainer)
        return room and not self._batch_is_bad()

    def move_index(self, step: int) -> None:
        """Has the batches of a step that was undone get the indices after their own."""
        self._moved = step

    def drop_step(self) -> None:
        """Undoes the current step and goes on with the next batch."""
        self._undo_step()
        self._pause.hide(self._trainer, same_step=True)

    def to_snapshot(self, snapshot: TrainingSnapshot, skipped: Collection[RecordedBatch]) -> None:
        """Restores a snapshot and serves the batches since then, except those to skip."""
        self._restore(snapshot, replay=True)
        self._rewind(snapshot, skipped, same_step=False)

    def to_snapshot_only(self, snapshot: TrainingSnapshot) -> None:
        """Restores a snapshot and goes on with new data; ``global_step`` goes back."""
        self.to_last_snapshot(snapshot)
        self._pause.hide(self._trainer, same_step=False)
        # Data and loops have gone on since: the next snapshot is taken before the next batch.
        self._store.rotation.restart()

    def to_last_snapshot(self, snapshot: TrainingSnapshot) -> None:
        """Restores a snapshot as the fit ends; it stays confirmed."""
        self._restore(snapshot, replay=False)
        snapshot.steps.restore(self._trainer)

    def _restore(self, snapshot: TrainingSnapshot, *, replay: bool) -> None:
        self._find_writes()
        self._store.wait()
        self._store.rotation.discard()
        if snapshot is self._store.rotation.older:
            self._store.rotation.go_back()
        self._before_undo.capture()
        self._since, self._undone, self._undone_to = 0, True, snapshot
        for path in self._ledger.go_back(snapshot.mark):
            self._log(f"checkpoint written since the snapshot, renamed: {path}")
        self._pause.forget()
        self._warn_of_first_step(snapshot)
        crossing = snapshot.crosses_change_of_groups(self._trainer)
        if not (replay and crossing) and snapshot.kept_by_callbacks:
            self._log_once(_KEPT.format(", ".join(snapshot.kept_by_callbacks[:5])))
        snapshot.restore(self._trainer, replay=replay)
        self._writes.begin()

    def _rewind(
        self,
        to: StepStart | TrainingSnapshot,
        skipped: Collection[RecordedBatch],
        *,
        same_step: bool,
    ) -> None:
        epoch = to.loops.epoch
        self._recorder.rewind(to.position, epoch, skipped)
        more = self._recorder.more_in(epoch)
        to.loops.restore_at_batch_end(self._trainer, more=more)
        self._pause.hide(self._trainer, same_step=same_step)
        self._finish = to if more else None
        if not more:
            self._pause.release_epoch()
            end_epoch_schedulers(self._trainer)
            count_skipped_batches(self._trainer, self._ring.skipped[epoch])

    def batch_ended(self) -> None:
        """Updates counts after an accepted batch, or after the response to a rejected one."""
        self._ring.check_modified()
        if self.replay and self._ring.modifies:
            self._log_once(_COPIES)
        if not self._skipper.active:
            if self.stepped:
                self._ring.accept_draws()
            skipped = self._ring.skipped[self._trainer.current_epoch]
            count_skipped_batches(self._trainer, skipped)
            self._since += self._accepted
            self._stepped = self._stepped or self._accepted > 0
            for _ in range(self._accepted):
                self._store.healthy()
        if self._skipper.active or self.stepped:
            self._begin_window()
        if self._undone_to is not None:
            self._after_undo.capture()
            self._rng = capture_rng()

    def epoch_ended(self) -> None:
        """Releases the schedulers: no further batch is fetched in this epoch."""
        self.hooks_ended()
        self._pause.end()

    def _log(self, line: str) -> None:
        if self._trainer.is_global_zero:
            log.info(line)

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            self._log(line)
