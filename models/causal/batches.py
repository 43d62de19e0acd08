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
    """float32; the numbers at `num_id`, NaN a missing one, 0 elsewhere."""
    mask_BL: Tensor
    """bool; True for what may be attended to, False for padding."""
    target_B: Tensor
    """int64; the next token, or `num_id`."""
    value_B: Tensor
    """float32; the next number, NaN where none or a missing one follows."""


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
            values += [0.0] * len(ids) if isinstance(piece, str) else [piece]
        target, value = self._next(sentence.target)
        return Batch(
            torch.tensor(tokens),
            torch.tensor(values, dtype=torch.float32),
            torch.ones(len(tokens), dtype=torch.bool),
            torch.tensor(target),
            torch.tensor(value, dtype=torch.float32),
        )

    def _next(self, target: str | float) -> tuple[int, float]:
        if isinstance(target, str):
            return self.encode(target)[0], math.nan
        return self.num_id, target


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
    tokens, values, masks, targets, numbers = zip(*rows, strict=True)
    padded = (pad_sequence(list(each), batch_first=True) for each in (tokens, values, masks))
    return Batch(*padded, torch.stack(targets), torch.stack(numbers))
