"""Batches kept to be trained on again, and the fetcher that serves them.

The fetcher of the fit loop is given a subclass that keeps every raw batch, as it came from the
loader, with the generators' state right after it was fetched. A rewind puts what was kept in a
queue that is served before anything new is fetched.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lit_stability.measurement.tensor_tree import size_of, tensors_in
from lit_stability.trainer_internals.data_fetcher import (
    FetcherObserver,
    current_fetcher,
    draws_its_batches,
    observe,
    stop_observing,
)
from lit_stability.training_state.rng import capture_rng, restore_rng


@dataclass(eq=False)
class RecordedBatch:
    """One raw batch, with what it takes to serve it again."""

    item: Any
    """What the fetcher returned: batch, index, loader."""
    epoch: int
    index: int
    """Position in its epoch, as the loader counts."""
    rng: dict[str, Any] | None
    """Generators right after the fetch; None to let their streams run on instead."""
    nbytes: int
    versions: tuple[int, ...]
    step: int = -1
    """Optimizer steps taken before the step it belongs to."""
    modified: bool = False
    """Whether the training step wrote into it."""


class ReplayRing:
    """The raw batches since the oldest snapshot, in order, and those waiting to be served again.

    Positions count batches served since the start of the fit.

    Args:
        max_bytes: of the batches kept; the oldest are given up beyond it.
        clone: keep copies, for training steps that write into their batch.
    """

    def __init__(self, max_bytes: int, clone: bool) -> None:
        self.max_bytes, self.clone = max_bytes, clone
        self.entries: deque[RecordedBatch] = deque()
        self.queue: deque[RecordedBatch] = deque()
        self.left_out: Counter[int] = Counter()
        """Batches left out of each epoch."""
        self.first = 0
        """Position of the oldest entry."""
        self.nbytes = 0

    @property
    def position(self) -> int:
        """Of the batch that is served next."""
        return self.first + len(self.entries)

    def since(self, position: int) -> list[RecordedBatch]:
        """The entries from a position on.

        Raises:
            LookupError: if they are not all there any more.
        """
        if position < self.first:
            raise LookupError(f"batches before {self.first} are no longer kept, {position} asked")
        return list(self.entries)[position - self.first :]

    def replayable(self, position: int, leave_out: Collection[RecordedBatch] = ()) -> bool:
        """Whether everything from a position on, but for what is left out, is there unspoilt."""
        if position < self.first:
            return False
        return not any(e.modified and e not in leave_out for e in self.since(position))

    def add(self, entry: RecordedBatch) -> None:
        """Keep an entry that is being served."""
        self.entries.append(entry)
        self.nbytes += entry.nbytes
        while self.nbytes > self.max_bytes and len(self.entries) > 1:
            self._give_up_oldest()

    def prune(self, position: int) -> None:
        """Give up what lies before a position."""
        while self.first < position and self.entries:
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        self.nbytes -= self.entries.popleft().nbytes
        self.first += 1

    def rewind(self, position: int, leave_out: Collection[RecordedBatch] = ()) -> None:
        """Queue the entries from a position on, but for those left out.

        From the first that is left out on the generators' streams run on, as they would if it had
        never come.
        """
        again, blameless = [], True
        for entry in self.since(position):
            self.entries.pop()
            self.nbytes -= entry.nbytes
            if entry in leave_out:
                self.left_out[entry.epoch] += 1
                blameless = False
                continue
            if not blameless:
                entry.rng = None
            again.append(entry)
        self.queue.extendleft(reversed(again))

    def check_modified(self) -> None:
        """Note whether the training step wrote into the batch that was served last."""
        if not self.clone and self.entries:
            entry = self.entries[-1]
            entry.modified = entry.modified or _versions(entry.item) != entry.versions


class BatchRecorder(FetcherObserver):
    """Makes the fit loop's fetcher keep what it serves, and serve what is queued.

    Args:
        trainer: in its fit.
        ring: where batches are kept.
        before_fetch: called between two batches, before the next is fetched.
    """

    def __init__(
        self, trainer: Trainer, ring: ReplayRing, before_fetch: Callable[[], None]
    ) -> None:
        self._trainer, self.ring, self._before_fetch = trainer, ring, before_fetch
        self._fetcher: Any = None
        self._live_epoch = 0
        self._live_done = False
        self._rewound = False

    @property
    def can_replay(self) -> bool:
        """False for modules that draw their batches themselves, from ``dataloader_iter``."""
        return not draws_its_batches(self._fetcher)

    def attach(self) -> None:
        """Take hold of the fetcher, at the start of the fit and wherever it may be a new one."""
        fetcher = current_fetcher(self._trainer)
        if fetcher is None or fetcher is self._fetcher:
            return
        self.detach()
        self._fetcher = fetcher
        observe(fetcher, self)
        self._live_epoch = self._trainer.current_epoch
        self._live_done = fetcher.done

    def detach(self) -> None:
        """Leave the fetcher as it was found."""
        if self._fetcher is not None:
            stop_observing(self._fetcher, self)
            self._fetcher = None

    def rewind(self, position: int, epoch: int, leave_out: Collection[RecordedBatch] = ()) -> None:
        """Serve the batches from a position, which lies in an epoch, once more."""
        self.ring.rewind(position, leave_out)
        self._rewound = epoch < self._live_epoch

    def more_in(self, epoch: int) -> bool:
        """Whether an epoch has another batch to serve."""
        if self.ring.queue:
            return self.ring.queue[0].epoch == epoch
        return epoch == self._live_epoch and not self._live_done

    @property
    def replayed_index(self) -> int | None:
        """Index of the next batch, if the loader is beyond it; -1 if in another epoch."""
        if not self.ring.queue:
            return None
        waiting = self.ring.queue[0]
        return waiting.index if waiting.epoch == self._live_epoch else -1

    def next(self, fetcher: Any, fetch: Callable[[], Any]) -> Any:
        """What the fetcher returns."""
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
        """What the fetcher does at the start of an epoch."""
        epoch = self._trainer.current_epoch
        if self._rewound and epoch <= self._live_epoch:
            # The loader is in this epoch, or beyond it, already.
            self._rewound = epoch < self._live_epoch
            fetcher.done = not self.more_in(epoch)
            return fetcher
        restart()
        self._live_epoch, self._live_done = epoch, fetcher.done
        return fetcher


def _versions(item: Any) -> tuple[int, ...]:
    return tuple(t._version for t in tensors_in(item) if not t.is_inference())
