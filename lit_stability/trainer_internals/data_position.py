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
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher

from lit_stability.trainer_internals.dataloaders import generators, is_plain, iterators, loaders
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


class DataPosition:
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

    def attach(self, trainer: Trainer) -> None:
        """Follow the loaders from the moment they exist; before the fit's data are set up."""
        self._trainer = trainer
        loop = trainer.fit_loop
        set_up, load_states = loop.setup_data, loop._load_combined_loader_states

        def setup_data() -> None:
            set_up()
            self._watch(loop._data_fetcher)

        def load_combined_loader_states() -> None:
            # The last thing that happens before the loaders are iterated for the first time.
            load_states()
            self._before_iter()

        vars(loop)["setup_data"] = setup_data
        vars(loop)["_load_combined_loader_states"] = load_combined_loader_states

    def detach(self) -> None:
        """Leave the trainer as it was found."""
        if self._trainer is None:
            return
        loop = self._trainer.fit_loop
        for name in ("setup_data", "_load_combined_loader_states"):
            vars(loop).pop(name, None)
        loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)
        self._trainer = self._pending = None

    @property
    def obstacle(self) -> str | None:
        """Why the position of these data cannot be restored, or None."""
        assert self._trainer is not None
        loop = self._trainer.fit_loop
        if isinstance(loop._data_fetcher, _DataLoaderIterDataFetcher):
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
        ahead = len(getattr(loop._data_fetcher, "batches", ()))
        recorder = getattr(loop._data_fetcher, "recorder", None)
        behind = None if recorder is None else recorder.behind
        if behind == -1:
            # Batches of an epoch that the loader has left are being trained on again.
            return {}
        states = dict(self._states)
        if ahead and self._last is not None:
            states[self._last[0]] = self._last[1]
        if self._first is not None:
            states[0] = self._first
        return {
            "batches": self._fetches - ahead if behind is None else behind,
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
        """Give the fetcher a subclass of its own class that tells of each fetch."""
        if fetcher is None or getattr(fetcher, "_position", None) is self:
            return
        base = type(fetcher)
        position = self

        def __iter__(fetcher: Any) -> Any:
            position._before_iter()
            base.__iter__(fetcher)
            position._fetches = fetcher.fetched
            return fetcher

        def __next__(fetcher: Any) -> Any:
            if position._pending is not None:
                position._take_up(fetcher, base)
            position._between()
            return position._fetch(fetcher, base)

        body = {"__iter__": __iter__, "__next__": __next__, "_position": position}
        fetcher.__class__ = type(base.__name__, (base,), body)
        self._fetches = fetcher.fetched

    def _before_iter(self) -> None:
        assert self._trainer is not None
        self._start = {
            "rng": capture_rng(),
            "generators": [g.get_state() for g in generators(self._trainer)],
            # Persistent workers are seeded once: to iterate their loader again draws less.
            "again": [getattr(dl, "_iterator", None) is not None for dl in loaders(self._trainer)],
        }
        self._fetches, self._first, self._last, self._states = 0, None, None, {}

    def _fetch(self, fetcher: Any, base: type) -> Any:
        """Fetch, and keep the generators' states if the fetch cannot be repeated without them."""
        assert self._trainer is not None
        index, count = self._fetches, fetcher.fetched
        found = loaders(self._trainer)
        plain = all(map(is_plain, found))
        before = capture_rng() if index == 0 or not plain or len(found) > 1 else None
        begun = iterators(fetcher)
        item = base.__next__(fetcher)  # type: ignore[attr-defined]
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

    def _take_up(self, fetcher: Any, base: type) -> None:
        assert self._trainer is not None
        state, self._pending = self._pending, None
        assert state is not None
        self._trainer.fit_loop.epoch_loop.__dict__.pop("_should_check_val_fx", None)
        if self.obstacle is None and not self._stateful:
            if state["epoch_over"]:
                self._set_generators(state["generators_now"])
                fetcher.__iter__()
                return
            self._repeat(fetcher, base, state)
        restore_rng(unpack_rng(state["now"]))

    def _repeat(self, fetcher: Any, base: type, state: Mapping[str, Any]) -> None:
        """Iterate the loaders as the epoch began, and drop what was trained on."""
        assert self._trainer is not None
        fetcher.combined_loader.reset()
        for loader, again in zip(loaders(self._trainer), state["again"], strict=False):
            if again:
                iter(loader)
        self._set_generators(state["generators"])
        restore_rng(unpack_rng(state["start"]))
        self._before_iter()
        base.__iter__(fetcher)  # type: ignore[attr-defined]
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
                base.__next__(fetcher)  # type: ignore[attr-defined]
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
