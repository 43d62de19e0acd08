"""Records batches so that they can be replayed, and replays them.

The recorder observes the data fetcher of the fit loop. It records every raw batch, as the loader
returned it, with the state of the random generators right after the fetch. A rewind moves recorded
batches to a queue, which is served before any new batch is fetched.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_stability.measurement.tensor_tree import size_of, tensors_in
from lit_stability.trainer_internals.data_fetcher import (
    FetcherObserver,
    current_fetcher,
    draws_its_batches,
    observe,
    stop_observing,
)
from lit_stability.trainer_internals.trainer_view import is_called
from lit_stability.training_state.rng import capture_rng, fresh_rng, restore_rng


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
    versions: tuple[int, ...]
    step: int = -1
    """Number of optimizer steps before the step that the batch belongs to."""
    own_rng: tuple[dict[str, Any] | None] | None = None
    """The state before it was replaced to draw other random numbers; None if it was not."""
    modified: bool = False
    """Whether the training step modified the batch in place."""
    raised: bool = False
    """Whether the training step raised an exception when it last saw the batch."""


class ReplayRing:
    """The raw batches since the oldest snapshot, in order, and the queue of batches to replay.

    Positions count the batches served since the start of the fit.

    Args:
        max_bytes: bound on the size of the recorded batches; the oldest are dropped beyond it.
        clone: serves copies, for a training step that modifies its batch in place.
    """

    def __init__(self, max_bytes: int, clone: bool) -> None:
        self.max_bytes, self.clone = max_bytes, clone
        self.entries: deque[RecordedBatch] = deque()
        self.queue: deque[RecordedBatch] = deque()
        self.skipped: Counter[int] = Counter()
        """Number of skipped batches, by epoch."""
        self.first = 0
        """Position of the oldest entry."""
        self.nbytes = 0

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
        while self.nbytes > self.max_bytes and len(self.entries) > 1:
            self._drop_oldest()

    def prune(self, position: int) -> None:
        """Drops the entries before a position."""
        while self.first < position and self.entries:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.nbytes -= self.entries.popleft().nbytes
        self.first += 1

    def rewind(self, position: int, skipped: Collection[RecordedBatch] = ()) -> None:
        """Moves the entries from a position on to the queue, except the skipped ones.

        After the first skipped batch, the generators are no longer reset. They continue as if that
        batch had never existed.
        """
        queued, reset_rng = [], True
        for entry in self.since(position):
            self.entries.pop()
            if entry.own_rng is not None:
                (entry.rng,), entry.own_rng = entry.own_rng, None
            self.nbytes -= entry.nbytes
            if entry in skipped:
                self.skipped[entry.epoch] += 1
                reset_rng = False
                continue
            if not reset_rng:
                entry.rng = None
            queued.append(entry)
        self.queue.extendleft(reversed(queued))

    def redraw(self, step: int, salt: int) -> None:
        """Has the queued batches of a step draw other random numbers than before."""
        first = True
        for entry in self.queue:
            if entry.step != step:
                continue
            entry.own_rng = (entry.rng,)
            entry.rng = fresh_rng(entry.rng or capture_rng(), salt) if first else None
            first = False

    def check_modified(self) -> None:
        """Checks whether the training step modified the last served batch in place."""
        if not self.clone and self.entries:
            entry = self.entries[-1]
            entry.modified = entry.modified or _versions(entry.item) != entry.versions


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
        ring = self.ring
        if ring.queue:
            entry = ring.queue.popleft()
            if entry.rng is not None:
                restore_rng(entry.rng)
            fetcher.done = not self.more_in(entry.epoch)
        else:
            fetcher.done = self._live_done
            item = fetch()
            self._live_done = fetcher.done
            index = fetcher.fetched - len(getattr(fetcher, "batches", ())) - 1
            size = size_of(item)
            entry = RecordedBatch(item, self._live_epoch, index, None, size, _versions(item))
        entry.rng = capture_rng()
        ring.add(entry)
        return copy.deepcopy(entry.item) if ring.clone else entry.item

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


def _versions(item: Any) -> tuple[int, ...]:
    return tuple(t._version for t in tensors_in(item) if not t.is_inference())
