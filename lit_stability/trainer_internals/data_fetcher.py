"""The one patch of the fit loop's data fetcher, for everything that follows or serves the data.

The fetcher gets a subclass of its own class, which asks its observers at each ``__iter__`` and
``__next__``. The observer that was added last is asked first, and decides whether and when the
others, and in the end the fetcher itself, are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_stability.lightning_package import Trainer, fetchers


class FetcherObserver:
    """Sees every batch that a data fetcher returns, and may return others."""

    def iterate(self, fetcher: Any, restart: Callable[[], Any]) -> Any:
        """Called at the start of an epoch; returns what ``__iter__`` returns.

        Args:
            fetcher: of the fit loop.
            restart: starts the iteration of the loaders from the beginning.
        """
        return restart()

    def next(self, fetcher: Any, fetch: Callable[[], Any]) -> Any:
        """Called for each batch; returns what ``__next__`` returns.

        Args:
            fetcher: of the fit loop.
            fetch: takes the next batch from the loaders.
        """
        return fetch()

    @property
    def paused(self) -> bool:
        """Whether to leave this observer out: a tuner uses the loop for a search of its own."""
        return False

    def passed_over(self) -> None:
        """Called for each batch that was fetched while this observer was paused."""

    @property
    def replayed_index(self) -> int | None:
        """Index of the next batch if it is a replayed one; -1 if it is of an earlier epoch."""
        return None


def current_fetcher(trainer: Trainer) -> Any:
    """Returns the fetcher of the fit loop, None before the data are set up."""
    return trainer.fit_loop._data_fetcher


def draws_its_batches(fetcher: Any) -> bool:
    """Returns whether the module takes ``dataloader_iter`` and fetches its batches itself."""
    return isinstance(fetcher, fetchers._DataLoaderIterDataFetcher)


def observers(fetcher: Any) -> list[FetcherObserver]:
    """Returns the observers of a fetcher, the first added first."""
    return list(getattr(fetcher, "observers", ()))


def observe(fetcher: Any, observer: FetcherObserver) -> None:
    """Adds an observer to a fetcher, once."""
    if not hasattr(fetcher, "observers"):
        fetcher.__class__ = _observed(type(fetcher))
    if observer not in fetcher.observers:
        fetcher.observers.append(observer)


def carry_over(previous: Any, current: Any) -> None:
    """Moves the observers of a fetcher to the one that has replaced it."""
    if previous is not current and current is not None:
        for observer in observers(previous):
            stop_observing(previous, observer)
            observe(current, observer)


def stop_observing(fetcher: Any, observer: FetcherObserver) -> None:
    """Removes an observer; a fetcher without observers gets its own class back."""
    if observer in observers(fetcher):
        fetcher.observers.remove(observer)
        if not fetcher.observers:
            fetcher.__class__ = original_class(fetcher)


def original_class(fetcher: Any) -> Any:
    """Returns the class of a fetcher without the patch."""
    return type(fetcher).__mro__[1] if hasattr(fetcher, "observers") else type(fetcher)


def _observed(base: Any) -> type:
    """A subclass of a fetcher's class that asks the observers of its one instance."""

    def __iter__(self: Any) -> Any:
        asked = [each for each in self.observers if not each.paused]

        def ask(count: int) -> Any:
            if not count:
                return base.__iter__(self)
            return asked[count - 1].iterate(self, lambda: ask(count - 1))

        return ask(len(asked))

    def __next__(self: Any) -> Any:
        asked = [each for each in self.observers if not each.paused]
        for each in self.observers:
            if each not in asked:
                each.passed_over()

        def ask(count: int) -> Any:
            if not count:
                return base.__next__(self)
            return asked[count - 1].next(self, lambda: ask(count - 1))

        return ask(len(asked))

    def __reduce__(self: Any) -> Any:
        # A copy, of a Trainer for one, is a fetcher without observers.
        return object.__new__, (base,), vars(self)

    # A mixin would change the layout, which Python refuses when the class of an object is changed.
    body = {"__iter__": __iter__, "__next__": __next__, "__reduce__": __reduce__, "observers": []}
    return type(base.__name__, (base,), body)
