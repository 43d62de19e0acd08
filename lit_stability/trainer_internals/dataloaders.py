"""The training loaders of a fit: what of them can be repeated, and what they draw from."""

from __future__ import annotations

from collections.abc import Iterator
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
