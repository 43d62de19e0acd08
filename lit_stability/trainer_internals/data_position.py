"""Where in its data a run stands, and how another process comes to stand there.

A data loader has no position that could be saved, but it has a past: the states of the random
generators just before it was iterated, and the number of batches it gave. Iterated anew from the
same states and drained of that many batches, it goes on with the very batch that came next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer

from lit_stability.trainer_internals.data_fetcher import (
    FetcherObserver,
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
)
from lit_stability.training_state.rng import (
    capture_rng,
    pack_rng,
    restore_rng,
    same_rng,
    unpack_rng,
)

log = logging.getLogger("lightning.pytorch.lit_stability")

MOST_STATES = 500
"""Generator states kept per epoch for data sets that draw while they are read, 10 kB each."""


class DataPosition(FetcherObserver):
    """Follows the data of a fit; draws no random number and fetches no batch in a healthy run.

    What is followed: shuffling by samplers, with the global generators or with their own; workers;
    iterable data sets; augmentation in this process; loaders combined, reloaded, limited.

    What cannot be: a module that takes ``dataloader_iter``; loaders with a state of their own,
    which Lightning saves itself; what a data set or data module counts in its own attributes;
    workers that persist across epochs and draw; a training loader that is built otherwise in a
    later epoch than the one in which a ``reload_dataloaders_every_n_epochs`` was due.

    Args:
        between: called before each fetch of a batch, when everything that belongs to the batch
            before it is over: hooks, validation, schedulers, counters.
    """

    def __init__(self, between: Callable[[], None]) -> None:
        self._between = between
        self._trainer: Trainer | None = None
        self._pending: Mapping[str, Any] | None = None
        self._fetches = 0
        self._start: dict[str, Any] = {}
        self._first: dict[str, Any] | None = None
        self._last: tuple[int, dict[str, Any]] | None = None
        self._states: dict[int, dict[str, Any]] = {}
        self._told = False
        self._undo: Callable[[], None] = lambda: None

    def attach(self, trainer: Trainer) -> None:
        """Follow the loaders from the moment they exist; before the fit's data are set up."""
        self._trainer = trainer
        loop = trainer.fit_loop
        set_up = loop.setup_data

        def setup_data() -> None:
            set_up()
            self._watch(current_fetcher(trainer))

        vars(loop)["setup_data"] = setup_data
        self._undo = before_first_iteration(trainer, self._before_iter)

    def detach(self) -> None:
        """Leave the trainer as it was found."""
        if self._trainer is None:
            return
        loop = self._trainer.fit_loop
        vars(loop).pop("setup_data", None)
        self._undo()
        if (fetcher := current_fetcher(self._trainer)) is not None:
            stop_observing(fetcher, self)
        loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)
        self._trainer = self._pending = None

    @property
    def obstacle(self) -> str | None:
        """Why the position of these data cannot be restored, or None."""
        assert self._trainer is not None
        if draws_its_batches(current_fetcher(self._trainer)):
            return "training_step takes `dataloader_iter` and reads ahead on its own"
        return None

    @property
    def _stateful(self) -> bool:
        """Whether the loaders have a state of their own, which Lightning saves and restores."""
        assert self._trainer is not None
        return any(isinstance(dl, _Stateful) for dl in loaders(self._trainer))

    def state_dict(self) -> dict[str, Any]:
        """The position now, in what ``torch.load(weights_only=True)`` accepts; {} outside a fit."""
        if self._trainer is None or not self._start:
            return {}
        loop = self._trainer.fit_loop
        fetcher = current_fetcher(self._trainer)
        ahead = len(getattr(fetcher, "batches", ()))
        replayed = [each.replayed_index for each in observers(fetcher)]
        index = next((each for each in replayed if each is not None), None)
        if index == -1:
            # Batches of an epoch that the loader has left are being trained on again.
            return {}
        states = dict(self._states)
        if ahead and self._last is not None:
            states[self._last[0]] = self._last[1]
        if self._first is not None:
            states[0] = self._first
        return {
            "batches": self._fetches - ahead if index is None else index,
            "epoch_over": bool(loop.epoch_loop._num_ready_batches_reached()),
            "reloaded": self._reloaded,
            "start": pack_rng(self._start["rng"]),
            "generators": self._start["generators"],
            "again": self._start["again"],
            "generators_now": [g.get_state() for g in generators(self._trainer)],
            "states": {i: pack_rng(s) for i, s in states.items()},
            "now": pack_rng(capture_rng()),
        }

    def resume(self, state: Mapping[str, Any], *, between_batches: bool) -> None:
        """Arrange that the first fetch of this fit takes up a saved position; at its start.

        Args:
            state: what `state_dict` returned.
            between_batches: whether it was saved when everything that belongs to the batch before
                was over, as ``between`` is called; validation after that batch is over too then.
        """
        assert self._trainer is not None
        loop = self._trainer.fit_loop
        if state["reloaded"] is not None:
            loop._last_train_dl_reload_epoch = state["reloaded"]
        if between_batches:
            # Lightning would count the batch before once more to skip its validation.
            loop.epoch_loop.__dict__["_should_check_val_fx"] = lambda fetcher: False
        restore_rng(unpack_rng(state["now"]))
        self._pending = state

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
        """Restores a saved position before the first fetch; records what a fetch draws."""
        if self._pending is not None:
            self._take_up(fetcher)
        self._between()
        return self._fetch(fetcher, fetch)

    def _before_iter(self) -> None:
        assert self._trainer is not None
        self._start = {
            "rng": capture_rng(),
            "generators": [g.get_state() for g in generators(self._trainer)],
            # Persistent workers are seeded once: to iterate their loader again draws less.
            "again": [getattr(dl, "_iterator", None) is not None for dl in loaders(self._trainer)],
        }
        self._fetches, self._first, self._last, self._states = 0, None, None, {}

    def _fetch(self, fetcher: Any, fetch: Callable[[], Any]) -> Any:
        """Fetch, and keep the generators' states if the fetch cannot be repeated without them."""
        assert self._trainer is not None
        index, count = self._fetches, fetcher.fetched
        found = loaders(self._trainer)
        plain = all(map(is_plain, found))
        before = capture_rng() if index == 0 or not plain or len(found) > 1 else None
        begun = iterators(fetcher)
        item = fetch()
        self._fetches += fetcher.fetched - count
        if before is None or self._fetches == index:
            return item
        self._last = (index, before)
        if index == 0:
            self._first = before
        elif begun != iterators(fetcher) or not (plain or same_rng(before, capture_rng())):
            self._keep(index, before)
        return item

    def _keep(self, index: int, state: dict[str, Any]) -> None:
        if len(self._states) < MOST_STATES:
            self._states[index] = state
        elif not self._told:
            self._told = True
            log.info(
                "the data set or its sampler draws random numbers as it goes: after a resume more "
                "than %d batches into this epoch its order may be another; give it a generator of "
                "its own, or workers",
                MOST_STATES,
            )

    def _take_up(self, fetcher: Any) -> None:
        assert self._trainer is not None
        state, self._pending = self._pending, None
        assert state is not None
        self._trainer.fit_loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)
        if self.obstacle is None and not self._stateful:
            if state["epoch_over"]:
                self._set_generators(state["generators_now"])
                fetcher.__iter__()
                return
            self._repeat(fetcher, state)
        restore_rng(unpack_rng(state["now"]))

    def _repeat(self, fetcher: Any, state: Mapping[str, Any]) -> None:
        """Iterate the loaders as the epoch began, and drop what was trained on."""
        assert self._trainer is not None
        base = original_class(fetcher)
        fetcher.combined_loader.reset()
        for loader, again in zip(loaders(self._trainer), state["again"], strict=False):
            if again:
                iter(loader)
        self._set_generators(state["generators"])
        restore_rng(unpack_rng(state["start"]))
        self._before_iter()
        base.__iter__(fetcher)
        self._states = {i: unpack_rng(s) for i, s in state["states"].items()}
        self._first = self._states.pop(0, None)
        if state["batches"] >= 1000:
            log.info("reading the first %d batches of the epoch again", state["batches"])
        for done in range(state["batches"]):
            if (known := self._states.get(fetcher.fetched, None)) is not None:
                restore_rng(known)
            elif fetcher.fetched == 0 and self._first is not None:
                restore_rng(self._first)
            try:
                base.__next__(fetcher)
            except StopIteration:
                raise RuntimeError(
                    f"the training data end after {done} batches, the checkpoint was taken after "
                    f"{state['batches']} of its epoch: resume with the data of that run"
                ) from None
        self._fetches = fetcher.fetched
        if (ahead := self._states.get(self._fetches - 1)) is not None:
            self._last = (self._fetches - 1, ahead)

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        assert self._trainer is not None
        for generator, state in zip(generators(self._trainer), states, strict=False):
            generator.set_state(state.cpu())
