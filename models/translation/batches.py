"""Turns sentence pairs into padded batches: encoding, collation and length-sorted sampling."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from models.translation.pairs import Pair
from models.translation.vocabulary import PAD, Vocabulary


class Batch(NamedTuple):
    """Padded token ids of shape (B, S) and (B, T), int64."""

    source_BS: Tensor
    """Characters, then eos."""
    target_BT: Tensor
    """Bos, characters, eos. The decoder reads all but the last and predicts all but the first."""


class EncodedPairs(Dataset[Batch]):
    """Dataset of sentence pairs as unpadded id tensors: each item is a `Batch` without B."""

    def __init__(self, pairs: Sequence[Pair], vocabulary: Vocabulary) -> None:
        """Encodes every pair once."""
        self._items = [
            Batch(
                torch.tensor(vocabulary.encode(pair.source, eos=True)),
                torch.tensor(vocabulary.encode(pair.target, bos=True, eos=True)),
            )
            for pair in pairs
        ]

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self._items)

    def __getitem__(self, index: int) -> Batch:
        """Returns one encoded pair."""
        return self._items[index]

    def lengths(self) -> list[tuple[int, int]]:
        """Returns (target length, source length) of each pair, the sort key of the sampler."""
        return [(len(item.target_BT), len(item.source_BS)) for item in self._items]


def collate(items: Sequence[Batch]) -> Batch:
    """Pads encoded pairs on the right and stacks them into one batch."""
    sources, targets = zip(*items, strict=True)
    return Batch(
        *(
            pad_sequence(list(ids), batch_first=True, padding_value=PAD)
            for ids in (sources, targets)
        )
    )


class LengthSortedSampler(Sampler[int]):
    """Samples pairs in random order with pairs of similar length in the same batch.

    Shuffles the pairs, sorts them by length within windows of `window` batches, then shuffles the
    batches. The order depends only on seed and epoch; Lightning passes the epoch to `set_epoch`.
    """

    def __init__(
        self, lengths: Sequence[tuple[int, int]], batch_size: int, seed: int, window: int = 50
    ) -> None:
        """Stores the lengths of all pairs and the batch size of the DataLoader."""
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._window = window * batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that determines the order."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yields all indices, batch after batch."""
        rng = random.Random(f"{self._seed}/{self._epoch}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), self._window):
            window = sorted(order[start : start + self._window], key=self._lengths.__getitem__)
            batches += [
                window[i : i + self._batch_size] for i in range(0, len(window), self._batch_size)
            ]
        # A short batch must come last: the DataLoader cuts the indices into full batches.
        last = batches.pop() if batches and len(batches[-1]) < self._batch_size else []
        rng.shuffle(batches)
        for batch in batches:
            yield from batch
        yield from last
