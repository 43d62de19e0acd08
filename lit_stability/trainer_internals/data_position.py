"""Saves the position of a run in its training data, and restores it in another process.

A data loader has no position that could be saved. Saved instead are the states of the random
generators right before it was iterated, and the number of batches that it has returned. To resume,
the loader is iterated again from the same states and that many batches are dropped: the next batch
is the one that the interrupted run would have trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import Callback, Trainer, fabric_types
from lit_stability.trainer_internals.data_fetcher import (
    FetcherObserver,
    carry_over,
    current_fetcher,
    draws_its_batches,
    observe,
    observers,
    original_class,
    stop_observing,
)
from lit_stability.trainer_internals.dataloaders import (
    before_first_iteration,
    generators,
    is_plain,
    iterators,
    loaders,
    samples_of_all_ranks,
)
from lit_stability.trainer_internals.loop_counters import set_batches
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.trainer_view import is_called
from lit_stability.training_state.rng import (
    capture_rng,
    pack_rng,
    restore_rng,
    same_rng,
    unpack_rng,
)

log = suite_logger()

MAX_STATES = 500
"""Generator states saved per epoch if reading the data draws random numbers; 10 kB each."""
_EPOCHS = 64
"""Epochs of which is known how the loaders were read: a snapshot may be of an earlier epoch."""


@dataclass
class _EpochRead:
    """How the loaders were read in an epoch."""

    start: dict[str, Any] = field(default_factory=dict)
    """Generators before the loaders were iterated; empty before the first epoch."""
    first: dict[str, Any] | None = None
    """Random states before the first fetch."""
    last: tuple[int, dict[str, Any]] | None = None
    """Index of the last fetch, and the random states before it."""
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Random states before other fetches, by index."""
    epoch: int = 0
    reloaded: int | None = None
    """Epoch in which the loaders were built, if they are built again."""


class DataPosition(FetcherObserver):
    """Tracks the position in the training data; draws no random number and fetches no extra batch.

    Supported: shuffling by samplers, with the global generators or with their own; workers;
    iterable data sets; augmentation in the main process; combined, reloaded and limited loaders.

    Not supported: a module that takes ``dataloader_iter``; loaders with their own ``state_dict``,
    which Lightning saves itself; counters in attributes of a data set or data module; random
    numbers drawn in persistent workers; with ``reload_dataloaders_every_n_epochs``, a training
    loader that is built differently in a later epoch than the one in which the reload was due.

    Args:
        before_fetch: called before each fetch, when the previous batch is completely processed:
            hooks, validation, schedulers and counters.
        owner: the callback that tracks; paused while the trainer does not call it.
    """

    def __init__(self, before_fetch: Callable[[], None], owner: Callback | None = None) -> None:
        self._before_fetch, self._owner = before_fetch, owner
        self._trainer: Trainer | None = None
        self._pending: Mapping[str, Any] | None = None
        self._own = True
        """Whether the position to restore was saved by this rank."""
        self._fetches = 0
        self._read = _EpochRead()
        self._reads: deque[_EpochRead] = deque(maxlen=_EPOCHS)
        """Of the last epochs; the present one is the last."""
        self._earlier: tuple[int, int] | None = None
        """Epoch and index of the next batch, while the fit is in an earlier state."""
        self._limit_logged = False
        self._undo: Callable[[], None] = lambda: None

    def attach(self, trainer: Trainer) -> None:
        """Starts tracking; called before the fit sets up its data."""
        self._trainer = trainer
        loop = trainer.fit_loop
        set_up = loop.setup_data

        def setup_data() -> None:
            previous = current_fetcher(trainer)
            set_up()
            carry_over(previous, current_fetcher(trainer))
            self._watch(current_fetcher(trainer))

        self._patch = Patch(loop, "setup_data", setup_data)
        self._patch.apply()
        self._undo = before_first_iteration(trainer, self._before_iter)

    def detach(self) -> None:
        """Stops tracking and removes all patches from the trainer."""
        if self._trainer is None:
            return
        loop = self._trainer.fit_loop
        self._patch.remove()
        self._undo()
        if (fetcher := current_fetcher(self._trainer)) is not None:
            stop_observing(fetcher, self)
        loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)
        self._trainer = self._pending = None

    @property
    def obstacle(self) -> str | None:
        """The reason why the position in these data cannot be restored, or None."""
        assert self._trainer is not None
        if draws_its_batches(current_fetcher(self._trainer)):
            return "training_step takes `dataloader_iter` and fetches its batches itself"
        return None

    @property
    def paused(self) -> bool:
        """Whether a tuner has replaced the trainer's callbacks for a search."""
        trainer, owner = self._trainer, self._owner
        return trainer is not None and owner is not None and not is_called(trainer, owner)

    @property
    def _stateful(self) -> bool:
        """Whether a loader has its own ``state_dict``, which Lightning saves and restores."""
        assert self._trainer is not None
        return any(isinstance(dl, fabric_types._Stateful) for dl in loaders(self._trainer))

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, loadable with ``weights_only=True``; {} outside a fit."""
        if self._trainer is None or not self._read.start:
            return {}
        loop = self._trainer.fit_loop
        fetcher = current_fetcher(self._trainer)
        ahead = len(getattr(fetcher, "batches", ()))
        replayed = [observer.replayed_index for observer in observers(fetcher)]
        index = next((i for i in replayed if i is not None), None)
        read = self._read
        if self._earlier is not None:
            epoch, index = self._earlier
            read = self._read_of(epoch) or read
        elif index == -1:
            # A rollback replays batches of an epoch that the loader has already left.
            return {}
        states = dict(read.states)
        if read.last is not None and (ahead or self._earlier is not None):
            states[read.last[0]] = read.last[1]
        if read.first is not None:
            states[0] = read.first
        return {
            "batches": self._fetches - ahead if index is None else index,
            "samples_per_batch": samples_of_all_ranks(loaders(self._trainer)),
            "epoch_over": bool(loop.epoch_loop._num_ready_batches_reached()),
            "reloaded": self._reloaded,
            "start": pack_rng(read.start["rng"]),
            "generators": read.start["generators"],
            "again": read.start["again"],
            "generators_now": [g.get_state() for g in generators(self._trainer)],
            "states": {i: pack_rng(s) for i, s in states.items()},
            "now": pack_rng(capture_rng()),
        }

    def can_return_to(self, epoch: int) -> bool:
        """Returns whether it is known how to read the data up to a batch of an earlier state.

        Args:
            epoch: of the batch; the fit is in that state now.
        """
        assert self._trainer is not None
        read = self._read_of(epoch)
        return (
            read is not None
            and read.reloaded == self._reloaded
            # The end of an epoch is not a batch of the next one.
            and self._trainer.current_epoch == epoch
            and not self._trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        )

    def _read_of(self, epoch: int) -> _EpochRead | None:
        return next((read for read in reversed(self._reads) if read.epoch == epoch), None)

    @contextmanager
    def before_batch(self, epoch: int, index: int) -> Iterator[None]:
        """Has `state_dict` return the position before an earlier batch, while a block runs."""
        self._earlier = epoch, index
        try:
            yield
        finally:
            self._earlier = None

    def resume(
        self, state: Mapping[str, Any], *, between_batches: bool, ranks_then: int | None = None
    ) -> None:
        """Restores a saved position at the first fetch; called at the start of the fit.

        Args:
            state: return value of `state_dict`.
            between_batches: whether it was saved in ``before_fetch``, when the previous batch and
                the validation after it were completely processed.
            ranks_then: number of ranks that saved, if not this one of as many ranks did. Random
                states are then not restored, and the number of batches is converted.

        Raises:
            ValueError: if it cannot be converted; the message says what to do.
        """
        assert self._trainer is not None
        loop = self._trainer.fit_loop
        if state["reloaded"] is not None:
            loop._last_train_dl_reload_epoch = state["reloaded"]
        if between_batches:
            # To skip the validation of the previous batch, Lightning would count that batch twice.
            Patch(loop.epoch_loop, "_should_check_val_fx", lambda fetcher: False).apply()
        self._own = ranks_then is None
        if self._own:
            restore_rng(unpack_rng(state["now"]))
        elif not state["epoch_over"] and ranks_then != self._trainer.world_size:
            state = {**state, "batches": self._converted(state, ranks_then)}
            set_batches(self._trainer, state["batches"])
        self._pending = state

    def _converted(self, state: Mapping[str, Any], ranks_then: int | None) -> int:
        """Returns the number of batches in which these ranks train on the same samples.

        Raises:
            ValueError: if there is none.
        """
        assert self._trainer is not None
        then, now = state.get("samples_per_batch"), samples_of_all_ranks(loaders(self._trainer))
        ranks, batches = self._trainer.world_size, state["batches"]
        head = (
            f"the checkpoint was saved by {ranks_then} ranks after {batches} batches of its epoch, "
            f"where {ranks} cannot go on"
        )
        tail = f"resume with {ranks_then}, or from a checkpoint at the end of an epoch"
        if then is None or now is None:
            raise ValueError(
                f"{head}: the order of the samples is known for one loader with a "
                f"DistributedSampler only; {tail}"
            )
        if batches * then % now:
            raise ValueError(
                f"{head}: {batches * then} samples were trained on, which are no whole number of "
                f"batches of {now}, the batch size times the ranks; {tail}, or with a batch size "
                f"that makes this product divide {batches * then}"
            )
        return int(batches * then // now)

    @property
    def _reloaded(self) -> int | None:
        assert self._trainer is not None
        epoch = self._trainer.fit_loop._last_train_dl_reload_epoch
        return int(epoch) if epoch != float("-inf") else None

    def _watch(self, fetcher: Any) -> None:
        if fetcher is not None and self not in observers(fetcher):
            observe(fetcher, self)
            self._fetches = fetcher.fetched

    def iterate(self, fetcher: Any, restart: Callable[[], Any]) -> Any:
        """Records the generators before the loaders are iterated."""
        self._before_iter()
        restart()
        self._fetches = fetcher.fetched
        return fetcher

    def next(self, fetcher: Any, fetch: Callable[[], Any]) -> Any:
        """Restores a saved position before the first fetch; records random states of fetches."""
        if self._pending is not None:
            self._restore_position(fetcher)
        self._before_fetch()
        return self._fetch(fetcher, fetch)

    def _before_iter(self) -> None:
        assert self._trainer is not None
        start = {
            "rng": capture_rng(),
            "generators": [g.get_state() for g in generators(self._trainer)],
            # Persistent workers are seeded once: iterating their loader again draws fewer numbers.
            "again": [getattr(dl, "_iterator", None) is not None for dl in loaders(self._trainer)],
        }
        self._read = _EpochRead(start, epoch=self._trainer.current_epoch)
        self._reads.append(self._read)
        while len(self._reads) > 1 and sum(len(r.states) for r in self._reads) > MAX_STATES:
            self._reads.popleft()
        self._fetches = 0

    def _fetch(self, fetcher: Any, fetch: Callable[[], Any]) -> Any:
        """Fetches a batch, and stores the generators' states if a resume needs them."""
        assert self._trainer is not None
        index, count = self._fetches, fetcher.fetched
        all_loaders = loaders(self._trainer)
        plain = all(map(is_plain, all_loaders))
        before = capture_rng() if index == 0 or not plain or len(all_loaders) > 1 else None
        started = iterators(fetcher)
        item = fetch()
        self._fetches += fetcher.fetched - count
        if before is None or self._fetches == index:
            return item
        self._read.last = (index, before)
        if index == 0:
            self._read.first, self._read.reloaded = before, self._reloaded
        elif started != iterators(fetcher) or not (plain or same_rng(before, capture_rng())):
            self._store_state(index, before)
        return item

    def _store_state(self, index: int, state: dict[str, Any]) -> None:
        if len(self._read.states) < MAX_STATES:
            self._read.states[index] = state
        elif not self._limit_logged:
            self._limit_logged = True
            log.info(
                "reading the data draws random numbers: a resume after more than %d batches of an "
                "epoch may change their order; use workers or a separate generator",
                MAX_STATES,
            )

    def _restore_position(self, fetcher: Any) -> None:
        assert self._trainer is not None
        state, self._pending = self._pending, None
        assert state is not None
        self._trainer.fit_loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)
        if self.obstacle is None and not self._stateful:
            if state["epoch_over"]:
                if self._own:
                    self._set_generators(state["generators_now"])
                fetcher.__iter__()
                return
            self._replay_epoch(fetcher, state)
        if self._own:
            restore_rng(unpack_rng(state["now"]))

    def _replay_epoch(self, fetcher: Any, state: Mapping[str, Any]) -> None:
        """Iterates the loaders from the start of the epoch and drops the batches trained on."""
        assert self._trainer is not None
        base = original_class(fetcher)
        fetcher.combined_loader.reset()
        for loader, was_iterated in zip(loaders(self._trainer), state["again"], strict=False):
            if was_iterated:
                iter(loader)
        if self._own:
            self._set_generators(state["generators"])
            restore_rng(unpack_rng(state["start"]))
        self._before_iter()
        base.__iter__(fetcher)
        states = state["states"] if self._own else {}
        read = self._read
        read.states = {i: unpack_rng(s) for i, s in states.items()}
        read.first = read.states.pop(0, None)
        if state["batches"] >= 1000:
            log.info(
                "resume: reading the first %d batches of the epoch again to restore the data order",
                state["batches"],
            )
        for done in range(state["batches"]):
            if (saved := read.states.get(fetcher.fetched, None)) is not None:
                restore_rng(saved)
            elif fetcher.fetched == 0 and read.first is not None:
                restore_rng(read.first)
            try:
                base.__next__(fetcher)
            except StopIteration:
                raise RuntimeError(
                    f"the training data end after {done} batches, but the checkpoint was saved "
                    f"after {state['batches']} batches of its epoch: resume with the same data"
                ) from None
        self._fetches = fetcher.fetched
        if (ahead := read.states.get(self._fetches - 1)) is not None:
            read.last = (self._fetches - 1, ahead)

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        assert self._trainer is not None
        for generator, state in zip(generators(self._trainer), states, strict=False):
            generator.set_state(state.cpu())
