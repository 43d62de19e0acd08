"""Leaves batches out of a fit's training data, and knows which one could not be fetched.

Reaches inside Lightning's loops and torch's loaders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_stability.trainer_internals.data_fetcher import current_fetcher
from lit_stability.trainer_internals.dataloaders import before_first_iteration, loaders
from lit_stability.trainer_internals.loop_counters import count_skipped_batches

Samples = frozenset[Any]


class SkippingLoader:
    """A sampler that leaves out batches all of whose samples are unwanted.

    It stands in for a (batch) sampler and is it in all else. To say in time which batch is the
    last, it reads one batch ahead; where nothing is to be left out it reads none ahead.

    Args:
        inner: yields indices, or lists of them.
        unwanted: sets of indices; a batch within one of them is left out, halved batches too.
        recent: batches remembered.
        changed: called when one is left out.

    >>> sampler = SkippingLoader([[0, 1], [2, 3], [4, 5]], [frozenset([2, 3])])
    >>> list(sampler), sampler.missing
    ([[0, 1], [4, 5]], 1)
    """

    def __init__(
        self,
        inner: Iterable[Any],
        unwanted: Sequence[Samples] = (),
        recent: int = 2,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.inner = inner
        self.missing = 0
        """Batches left out since the iteration began."""
        self.counted = False
        """Whether its length tells of those that are missing."""
        self._unwanted, self._changed = unwanted, changed
        self._recent: deque[tuple[int, Any]] = deque(maxlen=recent)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner) - self.missing * self.counted  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.missing = 0
        self._recent.clear()
        batches = iter(self.inner)
        return self._remembered(self._wanted(batches) if self._unwanted else batches)

    def _remembered(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            self._recent.append((number, batch))
            yield batch

    def _wanted(self, batches: Iterator[Any]) -> Iterator[Any]:
        held: list[Any] = []
        for batch in batches:
            if self._is_unwanted(batch):
                self.missing += 1
                self._changed()
                continue
            yield from held
            held = [batch]
        yield from held

    def _is_unwanted(self, batch: Any) -> bool:
        samples = samples_of(batch)
        return bool(samples) and any(unwanted.issuperset(samples) for unwanted in self._unwanted)

    def batch(self, number: int) -> Any:
        """The batch of that number since the iteration began, if it is remembered, or None."""
        return next((batch for n, batch in self._recent if n == number), None)


def samples_of(batch: Any) -> tuple[Any, ...]:
    """The indices of a batch; empty for those of a kind that cannot be compared.

    >>> samples_of([3, 1]), samples_of(7), samples_of([[1], [2]])
    ((3, 1), (7,), ())
    """
    found = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    try:
        hash(found)
    except TypeError:
        return ()
    return found


class TrainingData:
    """The training loader of one fit, with batches left out.

    What can be left out: batches of one map-style ``DataLoader``.

    Args:
        trainer: before its fit sets its data up.
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
        self._sampler = SkippingLoader(inner, self._unwanted, ahead + 3, self._measure)
        # The loader refuses an assignment, to keep people from what it could not honour.
        vars(loader)[name] = self._sampler

        def undo() -> None:
            vars(loader)[name] = inner
            self._sampler = None

        self._undo = undo

    @property
    def _loader(self) -> DataLoader[Any] | None:
        found = loaders(self._trainer)
        if len(found) != 1 or not isinstance(found[0], DataLoader):
            return None
        return None if isinstance(found[0].dataset, IterableDataset) else found[0]

    def count(self, yes: bool) -> None:
        """Have the loader's length tell of what is left out, or not.

        Lightning takes the length of every epoch from that of the first, and only the end of each
        from what the fetcher says: it must be told while an epoch runs, and not in between.
        """
        if self._sampler is not None:
            self._sampler.counted = yes
            self._measure()

    def _measure(self) -> None:
        fetcher = current_fetcher(self._trainer)
        counted = self._sampler is not None and self._sampler.counted
        if counted and fetcher is not None and fetcher.length is not None:
            fetcher.length = sized_len(fetcher.combined_loader)

    def batch_ended(self) -> None:
        """Have the validation at the end of an epoch take place although batches are missing."""
        fetcher, batches = current_fetcher(self._trainer), self._trainer.num_training_batches
        if self._sampler is None or not self._sampler.missing or fetcher is None:
            return
        if fetcher.length is not None and batches > fetcher.length:
            count_skipped_batches(self._trainer, int(batches) - fetcher.length)

    def not_fetched(self) -> tuple[Any, ...] | None:
        """Samples of the batch that was to be fetched next, if they are known."""
        combined = self._trainer.fit_loop._combined_loader
        if self._sampler is None or combined is None:
            return None
        iterators = getattr(combined._iterator, "iterators", None)
        number = getattr(iterators[0], "_num_yielded", None) if iterators else None
        batch = None if number is None else self._sampler.batch(number)
        return None if batch is None else samples_of(batch) or None

    def close(self) -> None:
        """Leave trainer and loader as they were found."""
        self._stop()
        self._undo()
        self._undo = lambda: None
