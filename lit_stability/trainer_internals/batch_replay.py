"""Records batches so that they can be replayed, and replays them.

The recorder observes the data fetcher of the fit loop. It records every raw batch, as the loader
returned it, with the state of the random generators right after the fetch. A rewind moves recorded
batches to a queue, which is served before any new batch is fetched.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

from lit_stability.lightning_package import Callback, Trainer
from lit_stability.measurement.tensor_tree import size_of
from lit_stability.trainer_internals.batch_digest import digest_of
from lit_stability.trainer_internals.data_fetcher import (
    FetcherObserver,
    current_fetcher,
    draws_its_batches,
    observe,
    stop_observing,
)
from lit_stability.trainer_internals.trainer_view import is_called
from lit_stability.training_state.rng import capture_rng, fresh_rng, restore_rng

_TRIED = 3
"""First batches that are copied in any case."""


@dataclass(eq=False)
class RecordedBatch:
    """One raw batch, with the state that is needed to replay it."""

    item: Any
    """Return value of the fetcher: batch, batch index, dataloader index."""
    epoch: int
    index: int
    """Index in its epoch, as counted by the loader."""
    rng: dict[str, Any] | None
    """State of the generators right after the fetch; None: a replay does not reset them."""
    nbytes: int
    digest: tuple[Hashable, ...] | None
    """Of the batch as it was served; None when only a copy is left."""
    before: dict[str, Any] | None = None
    """State of the generators right before the fetch."""
    drawn: tuple[dict[str, Any] | None] | None = None
    """``rng`` before other random numbers were drawn, until a step with those is accepted."""
    step: int = -1
    """Number of optimizer steps before the step that the batch belongs to."""
    modified: bool = False
    """Whether the training step modified the batch, and there is no copy."""
    raised: bool = False
    """Whether the training step raised an exception when it last saw the batch."""
    original: Any = None
    """What was served in place of ``item``, which is a copy of it."""

    @property
    def served(self) -> Any:
        """The batch as the training step got it."""
        return self.item if self.original is None else self.original


class ReplayRing:
    """The raw batches since the oldest snapshot, in order, and the queue of batches to replay.

    Positions count the batches served since the start of the fit.

    Args:
        max_bytes: bound on the size of the recorded batches; the oldest are dropped beyond it.
        clone: keeps copies, for a training step that modifies its batches. The first batches are
            copied in any case, until it is seen whether the step modifies them.
    """

    def __init__(self, max_bytes: int, clone: bool) -> None:
        self.max_bytes, self.clone = max_bytes, clone
        self.modifies = False
        """Whether the training step was seen to modify a batch."""
        self._tried = 0
        self.entries: deque[RecordedBatch] = deque()
        self.queue: deque[RecordedBatch] = deque()
        self.skipped: Counter[int] = Counter()
        """Number of skipped batches, by epoch."""
        self.first = 0
        """Position of the oldest entry."""
        self.nbytes = 0
        self.resume: dict[str, Any] | None = None
        """State of the generators for the next new batch, after the last recorded one was skipped;
        None: they continue as they are."""

    @property
    def position(self) -> int:
        """Position of the next batch."""
        return self.first + len(self.entries)

    def since(self, position: int) -> list[RecordedBatch]:
        """Returns the entries from a position on.

        Raises:
            LookupError: if some of them were dropped.
        """
        if position < self.first:
            raise LookupError(f"batches before {self.first} were dropped, {position} requested")
        return list(self.entries)[position - self.first :]

    def replayable(self, position: int, skipped: Collection[RecordedBatch] = ()) -> bool:
        """Returns whether all batches from a position on, except skipped ones, are unmodified."""
        if position < self.first:
            return False
        return not any(e.modified and e not in skipped for e in self.since(position))

    def add(self, entry: RecordedBatch) -> None:
        """Records an entry that is being served."""
        self.entries.append(entry)
        self.nbytes += entry.nbytes
        self._drop_beyond_bound()

    def prune(self, position: int) -> None:
        """Drops the entries before a position."""
        while self.first < position and self.entries:
            self._drop_oldest()

    def bound(self, max_bytes: int) -> None:
        """Sets the bound, and drops the oldest entries beyond it."""
        self.max_bytes = max_bytes
        self._drop_beyond_bound()

    def _drop_beyond_bound(self) -> None:
        while self.nbytes > self.max_bytes and len(self.entries) > 1:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.nbytes -= self.entries.popleft().nbytes
        self.first += 1

    def rewind(self, position: int, skipped: Collection[RecordedBatch] = ()) -> None:
        """Moves the entries from a position on to the queue, except the skipped ones.

        After the first skipped batch, the generators are no longer reset. They continue as if that
        batch had never existed. If it was the first of its epoch, that is from the state in which
        the epoch's loader had left them.
        """
        queued, reset_rng = [], True
        self.resume, epoch = None, None
        for entry in self.since(position):
            if entry.drawn is not None:
                entry.rng, entry.drawn = *entry.drawn, None
            self.entries.pop()
            self.nbytes -= entry.nbytes
            if entry in skipped:
                self.skipped[entry.epoch] += 1
                if reset_rng and epoch not in (None, entry.epoch):
                    self.resume = entry.before
                reset_rng = False
                continue
            epoch = entry.epoch
            if not reset_rng:
                self._continue_with(entry)
            queued.append(entry)
        if not reset_rng:
            for entry in self.queue:
                self._continue_with(entry)
        self.queue.extendleft(reversed(queued))

    def _continue_with(self, entry: RecordedBatch) -> None:
        entry.rng, entry.before, self.resume = None, self.resume, None

    def redraw(self, step: int, salt: int) -> None:
        """Has the queued batches of a step draw other random numbers than before."""
        first = True
        for entry in self.queue:
            if entry.step != step:
                continue
            entry.drawn = (entry.rng,)
            entry.rng = fresh_rng(entry.rng or capture_rng(), salt) if first else None
            first = False

    def accept_draws(self) -> None:
        """Keeps the random numbers that were drawn for an accepted step, for replays of it."""
        for entry in self.entries:
            entry.drawn = None

    def check_modified(self) -> None:
        """Checks whether the training step modified the last served batch.

        From the first one on, copies are kept.
        """
        entry = self.entries[-1] if self.entries else None
        if entry is None or entry.digest is None:
            return
        changed = digest_of(entry.served) != entry.digest
        if changed and entry.original is None:
            entry.modified = True
        self.modifies = self.modifies or changed
        self.clone = self.clone or changed

    def serve(self, entry: RecordedBatch) -> Any:
        """Records an entry, and returns its batch: the loader's own, of which a copy is kept."""
        copies = self.clone or self._tried < _TRIED
        self._tried += 1
        self._release_original()
        if copies and entry.original is None:
            entry.item, entry.original = _copied(entry.item)
        self.add(entry)
        return entry.served

    def serve_again(self, entry: RecordedBatch) -> Any:
        """Records an entry that is replayed, and returns its batch, or a copy of it."""
        self._release_original()
        if self.clone:
            entry.item, entry.original = _copied(entry.item)
        entry.digest = digest_of(entry.served)
        self.add(entry)
        return entry.served

    def _release_original(self) -> None:
        """Keeps only one copy of the batch before, the one that no step has seen."""
        if self.entries and self.entries[-1].original is not None:
            self.entries[-1].original = self.entries[-1].digest = None


def _copied(item: Any) -> tuple[Any, Any]:
    """Returns a copy of a batch, and the batch; the batch and None if it cannot be copied."""
    try:
        return copy.deepcopy(item), item
    except Exception:
        return item, None


class BatchRecorder(FetcherObserver):
    """Records the batches that the data fetcher serves, and replays the queued ones.

    Args:
        trainer: in its fit.
        ring: stores the batches.
        before_fetch: called between two batches, before the next one is fetched.
        owner: the callback that records; paused while the trainer does not call it.
    """

    def __init__(
        self,
        trainer: Trainer,
        ring: ReplayRing,
        before_fetch: Callable[[], None],
        owner: Callback | None = None,
    ) -> None:
        self._trainer, self.ring, self._before_fetch = trainer, ring, before_fetch
        self._owner = owner
        self.interrupted = False
        """Whether batches were trained on, by a tuner, that were not recorded."""
        self._fetcher: Any = None
        self._live_epoch = 0
        self._live_done = False
        self._rewound = False

    @property
    def can_replay(self) -> bool:
        """False if the module fetches its batches itself, from ``dataloader_iter``."""
        return not draws_its_batches(self._fetcher)

    def attach(self) -> None:
        """Observes the current fetcher; called wherever Lightning may have created a new one."""
        fetcher = current_fetcher(self._trainer)
        if fetcher is None or fetcher is self._fetcher:
            return
        self.detach()
        self._fetcher = fetcher
        observe(fetcher, self)
        self._live_epoch = self._trainer.current_epoch
        self._live_done = fetcher.done

    def detach(self) -> None:
        """Stops observing the fetcher."""
        if self._fetcher is not None:
            stop_observing(self._fetcher, self)
            self._fetcher = None

    def rewind(self, position: int, epoch: int, skipped: Collection[RecordedBatch] = ()) -> None:
        """Replays the batches from a position on; the position is in the given epoch."""
        self.ring.rewind(position, skipped)
        self._rewound = epoch < self._live_epoch

    def more_in(self, epoch: int) -> bool:
        """Returns whether an epoch has another batch."""
        if self.ring.queue:
            return self.ring.queue[0].epoch == epoch
        return epoch == self._live_epoch and not self._live_done

    def restore_rng_before_next(self) -> None:
        """Restores the generators to what they were before a batch that is replayed or skipped.

        The start of an epoch draws random numbers, and loaders are not started again in a replay.
        """
        ring = self.ring
        if ring.queue:
            state = ring.queue[0].before
        else:
            state, ring.resume = ring.resume, None
        if state is not None:
            restore_rng(state)

    @property
    def replayed_index(self) -> int | None:
        """Index of the next batch if it is a replayed one; -1 if it is of another epoch."""
        if not self.ring.queue:
            return None
        entry = self.ring.queue[0]
        return entry.index if entry.epoch == self._live_epoch else -1

    @property
    def paused(self) -> bool:
        """Whether a tuner has replaced the trainer's callbacks for a search."""
        return self._owner is not None and not is_called(self._trainer, self._owner)

    def passed_over(self) -> None:
        """Records that the batches since the snapshots are no longer all known."""
        self.interrupted = True

    def next(self, fetcher: Any, fetch: Callable[[], Any]) -> Any:
        """Returns a queued batch if there is one, otherwise fetches and records a new one."""
        self._before_fetch()
        if not self.can_replay:
            return fetch()
        ring, before = self.ring, capture_rng()
        if ring.queue:
            entry = ring.queue.popleft()
            if entry.rng is not None:
                restore_rng(entry.rng)
            fetcher.done = not self.more_in(entry.epoch)
            serve = ring.serve_again
        else:
            fetcher.done = self._live_done
            item = fetch()
            self._live_done = fetcher.done
            index = fetcher.fetched - len(getattr(fetcher, "batches", ())) - 1
            found = digest_of(item)
            entry = RecordedBatch(item, self._live_epoch, index, None, size_of(item), found)
            serve = ring.serve
        entry.before, entry.rng = before, capture_rng()
        return serve(entry)

    def iterate(self, fetcher: Any, restart: Callable[[], Any]) -> Any:
        """Starts an epoch; the loaders are not restarted for a replayed epoch."""
        epoch = self._trainer.current_epoch
        if self._rewound and epoch <= self._live_epoch:
            # The loader has already started this epoch, or a later one.
            self._rewound = epoch < self._live_epoch
            fetcher.done = not self.more_in(epoch)
            return fetcher
        restart()
        self._live_epoch, self._live_done = epoch, fetcher.done
        return fetcher
