"""The training loaders of a fit: what of them can be repeated, and what they draw from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
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

_KNOWN = (
    type(None),
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
"""Samplers that draw when they are iterated, not as they go."""


def loaders(trainer: Trainer) -> list[Any]:
    """The loaders that are combined into batches; mostly one."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def is_plain(loader: Any) -> bool:
    """Whether reading a loader in one go repeats its order, whatever was drawn in between."""
    if not isinstance(loader, DataLoader):
        return False
    if isinstance(loader.dataset, IterableDataset):
        return loader.num_workers > 0
    return type(loader.batch_sampler) in _KNOWN and type(loader.sampler) in _KNOWN


def iterators(fetcher: Any) -> list[int]:
    """Changes where one of several loaders came to its end and was begun anew."""
    iterator = getattr(fetcher.combined_loader, "_iterator", None)
    return [id(each) for each in getattr(iterator, "iterators", ())]


def generators(trainer: Trainer) -> Iterator[torch.Generator]:
    """Generators that loaders and samplers were given, each once."""
    seen: set[int] = set()
    for loader in loaders(trainer):
        batch_sampler = getattr(loader, "batch_sampler", None)
        sampler = getattr(loader, "sampler", None)
        for owner in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield generator


def before_first_iteration(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Has a function called right before the training loaders are iterated for the first time.

    Functions are called in the order in which they were given.

    Args:
        trainer: before its fit sets its data up.
        call: takes nothing.

    Returns:
        What undoes it.
    """
    own = vars(trainer.fit_loop)
    patch = own.get(_LAST_BEFORE)
    if not isinstance(patch, _LoadStates):
        patch = own[_LAST_BEFORE] = _LoadStates(getattr(trainer.fit_loop, _LAST_BEFORE))
    patch.calls.append(call)

    def undo() -> None:
        if call in patch.calls:
            patch.calls.remove(call)
        if not patch.calls and own.get(_LAST_BEFORE) is patch:
            del own[_LAST_BEFORE]

    return undo


_LAST_BEFORE = "_load_combined_loader_states"
"""What the fit loop does last before it iterates the loaders for the first time."""


class _LoadStates:
    """Does what the fit loop does there, and then calls further functions."""

    def __init__(self, original: Callable[[], None]) -> None:
        self._original = original
        self.calls: list[Callable[[], None]] = []

    def __call__(self) -> None:
        self._original()
        for call in list(self.calls):
            call()
