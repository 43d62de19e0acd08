"""From sentence pairs to padded batches: encoding, collation and the order of a training epoch."""

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
    """Padded ids of shape (B, S) and (B, T), int64."""

    source_BS: Tensor
    """Characters and eos."""
    target_BT: Tensor
    """Bos, characters and eos: all but the last are read, all but the first are predicted."""


class EncodedPairs(Dataset[Batch]):
    """Pairs as unpadded id tensors, one `Batch` without its first dimension each."""

    def __init__(self, pairs: Sequence[Pair], vocabulary: Vocabulary) -> None:
        """Encode every pair once."""
        self._rows = [
            Batch(
                torch.tensor(vocabulary.encode(pair.source, eos=True)),
                torch.tensor(vocabulary.encode(pair.target, bos=True, eos=True)),
            )
            for pair in pairs
        ]

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        """Give one encoded pair."""
        return self._rows[index]

    def lengths(self) -> list[tuple[int, int]]:
        """Give target and source length of each pair, by which batches are made even."""
        return [(len(row.target_BT), len(row.source_BS)) for row in self._rows]


def collate(rows: Sequence[Batch]) -> Batch:
    """Pad encoded pairs on the right into one batch."""
    sources, targets = zip(*rows, strict=True)
    return Batch(
        *(
            pad_sequence(list(ids), batch_first=True, padding_value=PAD)
            for ids in (sources, targets)
        )
    )


class LengthSortedSampler(Sampler[int]):
    """Shuffles by seed and epoch, and puts pairs of like length into the same batch.

    The shuffled pairs are sorted by length within windows of `window` batches, and the batches of
    all windows are shuffled again. The order depends on seed and epoch alone; Lightning tells the
    epoch by `set_epoch`.
    """

    def __init__(
        self, lengths: Sequence[tuple[int, int]], batch_size: int, seed: int, window: int = 50
    ) -> None:
        """Take the lengths of all pairs, and the batch size of the loader."""
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._window = window * batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Give all indices, batch after batch."""
        rng = random.Random(f"{self._seed}/{self._epoch}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), self._window):
            near = sorted(order[start : start + self._window], key=self._lengths.__getitem__)
            batches += [
                near[i : i + self._batch_size] for i in range(0, len(near), self._batch_size)
            ]
        # Only the very last batch can be short: anywhere else it would shift all that follow.
        last = batches.pop() if batches and len(batches[-1]) < self._batch_size else []
        rng.shuffle(batches)
        for batch in batches:
            yield from batch
        yield from last
