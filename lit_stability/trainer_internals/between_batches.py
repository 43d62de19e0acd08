"""Calls a function between two batches, when the state of a fit is whole. May import Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_stability.lightning_package import Callback, Trainer
from lit_stability.trainer_internals.data_fetcher import (
    FetcherObserver,
    current_fetcher,
    observe,
    stop_observing,
)
from lit_stability.trainer_internals.trainer_view import is_called


class BetweenBatches(FetcherObserver):
    """Calls a function before each fetch of a batch: the one before is completely processed.

    That includes its hooks, the validation after it, schedulers and counters. Batches that a
    rollback replays are not fetched, so nothing is called between them.

    Args:
        trainer: of the fit.
        owner: the callback that is called; paused while a tuner searches.
        before_fetch: the function. What it raises ends the fit.
        fetch_failed: called with an exception of the loader, between two batches as well; the
            exception goes on afterwards.
    """

    def __init__(
        self,
        trainer: Trainer,
        owner: Callback,
        before_fetch: Callable[[], None],
        fetch_failed: Callable[[Exception], None],
    ) -> None:
        self._trainer, self._owner = trainer, owner
        self._before_fetch, self._fetch_failed = before_fetch, fetch_failed

    @property
    def paused(self) -> bool:
        """Whether a tuner has replaced the trainer's callbacks for a search."""
        return not is_called(self._trainer, self._owner)

    def attach(self) -> None:
        """Observes the present fetcher; to be called again when the loaders were reloaded."""
        if (fetcher := current_fetcher(self._trainer)) is not None:
            observe(fetcher, self)

    def detach(self) -> None:
        """Stops observing."""
        if (fetcher := current_fetcher(self._trainer)) is not None:
            stop_observing(fetcher, self)

    def next(self, fetcher: Any, fetch: Callable[[], Any]) -> Any:
        """Calls the function, and then fetches the batch."""
        self._before_fetch()
        ahead = list(getattr(fetcher, "batches", ()))
        try:
            return fetch()
        except StopIteration:
            raise
        except Exception as error:
            if ahead:
                # It had taken this batch out before it failed to fetch the one after it.
                fetcher.batches[:] = ahead
            self._fetch_failed(error)
            raise
