"""From sentences to padded batches: text as tokens, each number as `<NUM>` with its value.

`<NUM>` is no token of the tokenizer: it is the class after the last of the trunk's vocabulary,
so neither is changed. Shape letters: B batch, L positions. May import torch alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from models.causal.sentences import Sentence

Encode = Callable[[str], list[int]]
"""Turns text into token ids, without special tokens."""


class Batch(NamedTuple):
    """Sentences padded on the right, and what follows each."""

    tokens_BL: Tensor
    """int64; `num_id` where a number stands, 0 in the padding."""
    values_BL: Tensor
    """float32; the numbers at `num_id`, 0 elsewhere and for a missing one."""
    known_BL: Tensor
    """bool; True where a number stands that is not missing."""
    mask_BL: Tensor
    """bool; True for what may be attended to, False for padding."""
    target_B: Tensor
    """int64; the next token, or `num_id`."""
    value_B: Tensor
    """float32; the next number, 0 where none follows or a missing one."""
    known_B: Tensor
    """bool; True where a number follows that is not missing."""


@dataclass(frozen=True)
class Encoder:
    """Turns a sentence into a `Batch` without its first dimension."""

    encode: Encode
    num_id: int
    """The vocabulary size of the trunk."""

    def __call__(self, sentence: Sentence) -> Batch:
        """Encode one sentence; of a word that comes next, the first token counts."""
        tokens: list[int] = []
        values: list[float] = []
        for piece in sentence.pieces:
            ids = self.encode(piece) if isinstance(piece, str) else [self.num_id]
            tokens += ids
            values += [math.nan] * len(ids) if isinstance(piece, str) else [piece]
        target = sentence.target
        follows = self.encode(target)[0] if isinstance(target, str) else self.num_id
        # No NaN is in a batch, where it would be a fault.
        known, read = _known(values)
        value_known, value = _known([math.nan if isinstance(target, str) else target])
        return Batch(
            tokens_BL=torch.tensor(tokens),
            values_BL=read,
            known_BL=known,
            mask_BL=torch.ones(len(tokens), dtype=torch.bool),
            target_B=torch.tensor(follows),
            value_B=value[0],
            known_B=value_known[0],
        )


def _known(values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Which values are no NaN, and the values with 0 for those that are."""
    read = torch.tensor(values, dtype=torch.float32)
    return ~read.isnan(), read.nan_to_num(nan=0.0)


class EncodedSentences(Dataset[Batch]):
    """Sentences, encoded once."""

    def __init__(self, sentences: Sequence[Sentence], encoder: Encoder) -> None:
        """Encode every sentence."""
        self._rows = [encoder(each) for each in sentences]

    def __len__(self) -> int:
        """Count the sentences."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        """Give one encoded sentence."""
        return self._rows[index]


def collate(rows: Sequence[Batch]) -> Batch:
    """Pad encoded sentences on the right into one batch."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    padded = [pad_sequence(each, batch_first=True) for each in columns[:4]]
    return Batch(*padded, *(torch.stack(each) for each in columns[4:]))
