"""Skips batches of the training data, and identifies the batch that could not be fetched.

Uses private attributes of Lightning's loops and of torch's loaders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lit_stability.lightning_package import Trainer, sized_len
from lit_stability.trainer_internals.data_fetcher import current_fetcher
from lit_stability.trainer_internals.dataloaders import before_first_iteration, loaders
from lit_stability.trainer_internals.loop_counters import count_skipped_batches

Samples = frozenset[Any]


class SkippingLoader:
    """A sampler that skips batches whose samples are all unwanted.

    It replaces a sampler or batch sampler and forwards all other attributes to it. It reads one
    batch ahead, to know in time which batch is the last; with nothing to skip it does not.

    Args:
        inner: yields indices, or lists of them.
        unwanted: sets of indices; a batch that is a subset of one is skipped, thus halves too.
        recent: number of recent batches to keep.
        changed: called when a batch is skipped.
        gather: returns the values of all ranks, each of which has a sampler with the same number
            of batches; None on one rank. Batches of the same number belong to the same step, so a
            batch that one rank skips is skipped by all: else their epochs would end apart.

    >>> sampler = SkippingLoader([[0, 1], [2, 3], [4, 5]], [frozenset([2, 3])])
    >>> list(sampler), sampler.skipped
    ([[0, 1], [4, 5]], 1)
    """

    def __init__(
        self,
        inner: Iterable[Any],
        unwanted: Sequence[Samples] = (),
        recent: int = 2,
        changed: Callable[[], None] = lambda: None,
        gather: Callable[[list[int]], list[list[int]]] | None = None,
    ) -> None:
        self.inner = inner
        self.skipped = 0
        """Number of batches skipped since the iteration began."""
        self.counted = False
        """Whether ``len`` excludes the skipped batches."""
        self._unwanted, self._changed, self._gather = unwanted, changed, gather
        self._recent: deque[tuple[int, Any]] = deque(maxlen=recent)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner) - self.skipped * self.counted  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.skipped = 0
        self._recent.clear()
        batches = iter(self.inner)
        return self._recorded(self._wanted(batches) if self._unwanted else batches)

    def _recorded(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            self._recent.append((number, batch))
            yield batch

    def _wanted(self, batches: Iterator[Any]) -> Iterator[Any]:
        held: list[Any] = []
        for batch, unwanted in self._judged(batches):
            if unwanted:
                self.skipped += 1
                self._changed()
                continue
            yield from held
            held = [batch]
        yield from held

    def _judged(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """Yields each batch and whether it is skipped; with other ranks it reads all at once."""
        if self._gather is None:
            yield from ((batch, self._is_unwanted(batch)) for batch in batches)
            return
        known = list(batches)
        own = [number for number, batch in enumerate(known) if self._is_unwanted(batch)]
        skipped = {number for of_rank in self._gather(own) for number in of_rank}
        yield from ((batch, number in skipped) for number, batch in enumerate(known))

    def _is_unwanted(self, batch: Any) -> bool:
        samples = samples_of(batch)
        return bool(samples) and any(unwanted.issuperset(samples) for unwanted in self._unwanted)

    def batch(self, number: int) -> Any:
        """Returns a recent batch by its number since the iteration began, or None."""
        return next((batch for n, batch in self._recent if n == number), None)


def samples_of(batch: Any) -> tuple[Any, ...]:
    """Returns the indices of a batch; empty if they are not hashable.

    >>> samples_of([3, 1]), samples_of(7), samples_of([[1], [2]])
    ((3, 1), (7,), ())
    """
    samples = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    try:
        hash(samples)
    except TypeError:
        return ()
    return samples


def _gather(numbers: list[int]) -> list[list[int]]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, numbers)
    return found


class TrainingData:
    """The training loader of one fit, with unwanted batches skipped.

    Batches can be skipped if the fit has exactly one loader, a map-style ``DataLoader``. Several
    ranks agree on them at the start of each epoch, if there are any.

    Args:
        trainer: before its fit sets up the data.
        unwanted: sets of samples, as for `SkippingLoader`.
    """

    def __init__(self, trainer: Trainer, unwanted: Sequence[Samples]) -> None:
        self._trainer, self._unwanted = trainer, unwanted
        self._sampler: SkippingLoader | None = None
        self._undo: Callable[[], None] = lambda: None
        self._stop = before_first_iteration(trainer, self._attach)

    def _attach(self) -> None:
        loader = self._loader
        self._undo()
        if loader is None:
            return
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        inner: Any = getattr(loader, name)
        ahead = loader.num_workers * (loader.prefetch_factor or 1)
        gather = _gather if dist.is_initialized() and self._trainer.world_size > 1 else None
        self._sampler = SkippingLoader(
            inner, self._unwanted, ahead + 3, self._update_length, gather
        )
        # DataLoader.__setattr__ forbids this assignment after the construction.
        vars(loader)[name] = self._sampler

        def undo() -> None:
            vars(loader)[name] = inner
            self._sampler = None

        self._undo = undo

    @property
    def _loader(self) -> DataLoader[Any] | None:
        all_loaders = loaders(self._trainer)
        if len(all_loaders) != 1 or not isinstance(all_loaders[0], DataLoader):
            return None
        return None if isinstance(all_loaders[0].dataset, IterableDataset) else all_loaders[0]

    def count(self, enabled: bool) -> None:
        """Excludes skipped batches from the loader's length, or includes them again.

        Exclude them during an epoch and include them between epochs: Lightning reads the length of
        all epochs from the first one, but the end of each epoch from the length of the fetcher.
        """
        if self._sampler is not None:
            self._sampler.counted = enabled
            self._update_length()

    def _update_length(self) -> None:
        fetcher = current_fetcher(self._trainer)
        counted = self._sampler is not None and self._sampler.counted
        if counted and fetcher is not None and fetcher.length is not None:
            fetcher.length = sized_len(fetcher.combined_loader)

    def batch_ended(self) -> None:
        """Counts skipped batches at the end of an epoch, so that its validation is run."""
        fetcher, batches = current_fetcher(self._trainer), self._trainer.num_training_batches
        if self._sampler is None or not self._sampler.skipped or fetcher is None:
            return
        if fetcher.length is not None and batches > fetcher.length:
            count_skipped_batches(self._trainer, int(batches) - fetcher.length)

    def not_fetched(self) -> tuple[Any, ...] | None:
        """Returns the samples of the batch that was due to be fetched, or None if unknown."""
        combined = self._trainer.fit_loop._combined_loader
        if self._sampler is None or combined is None:
            return None
        iterators = getattr(combined._iterator, "iterators", None)
        number = getattr(iterators[0], "_num_yielded", None) if iterators else None
        batch = None if number is None else self._sampler.batch(number)
        return None if batch is None else samples_of(batch) or None

    def close(self) -> None:
        """Restores trainer and loader."""
        self._stop()
        self._undo()
        self._undo = lambda: None
