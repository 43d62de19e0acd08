"""The training loaders of a fit, their random generators, and whether they can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lit_stability.lightning_package import Trainer
from lit_stability.trainer_internals.patch import Patch

_KNOWN = (
    type(None),
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
"""Samplers that draw all random numbers when their iteration starts."""


def loaders(trainer: Trainer) -> list[Any]:
    """Returns the training loaders; usually there is only one."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def is_plain(loader: Any) -> bool:
    """Returns whether the order of a loader depends only on the random state at its start."""
    if not isinstance(loader, DataLoader):
        return False
    if isinstance(loader.dataset, IterableDataset):
        return loader.num_workers > 0
    return type(loader.batch_sampler) in _KNOWN and type(loader.sampler) in _KNOWN


def iterators(fetcher: Any) -> list[int]:
    """Returns ids of the loaders' iterators; they change when a loader is restarted."""
    iterator = getattr(fetcher.combined_loader, "_iterator", None)
    return [id(it) for it in getattr(iterator, "iterators", ())]


def generators(trainer: Trainer) -> Iterator[torch.Generator]:
    """Yields the generators that were passed to loaders and samplers, each once."""
    seen: set[int] = set()
    for loader in loaders(trainer):
        batch_sampler = getattr(loader, "batch_sampler", None)
        sampler = getattr(loader, "sampler", None)
        for owner in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield generator


def samples_of_all_ranks(loaders: Sequence[Any]) -> int | None:
    """Returns how many samples all ranks together take in a batch, of an order they share; or None.

    The order of a ``DistributedSampler`` depends on seed and epoch only, not on the number of
    ranks: rank ``r`` of ``n`` takes every ``n``-th sample from the ``r``-th on.
    """
    if len(loaders) != 1 or not isinstance(loaders[0], DataLoader):
        return None
    batches, sampler = loaders[0].batch_sampler, loaders[0].sampler
    if type(batches) is not BatchSampler or type(sampler) is not DistributedSampler:
        return None
    return int(batches.batch_size * sampler.num_replicas)


def before_first_iteration(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Registers a function to call right before the first iteration of the training loaders.

    Several functions are called in the order of registration.

    Args:
        trainer: before its fit sets up the data.
        call: function without arguments.

    Returns:
        A function that removes the registration.
    """
    own = vars(trainer.fit_loop)
    patch = own.get(_LAST_HOOK)
    if not isinstance(patch, _LoadStates):
        patch = own[_LAST_HOOK] = _LoadStates(trainer.fit_loop)
    patch.calls.append(call)

    def undo() -> None:
        if call in patch.calls:
            patch.calls.remove(call)
        if not patch.calls and own.get(_LAST_HOOK) is patch:
            del own[_LAST_HOOK]

    return undo


_LAST_HOOK = "_load_combined_loader_states"
"""Method that the fit loop calls last before the first iteration of the loaders."""


class _LoadStates(Patch):
    """Calls the original method of the fit loop, then the registered functions."""

    def __init__(self, loop: Any) -> None:
        original = getattr(loop, _LAST_HOOK)
        self.calls: list[Callable[[], None]] = []

        def load_states() -> None:
            original()
            for call in list(self.calls):
                call()

        super().__init__(loop, _LAST_HOOK, load_states)
