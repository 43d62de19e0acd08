"""Turns sentences into padded batches: text as token ids, each number as `<NUM>` with its value.

`<NUM>` is not a token of the tokenizer. Its id is the size of the backbone's vocabulary, so
neither tokenizer nor backbone changes. Shape suffixes: B batch, L sequence length. Imports only
torch.
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
    """Sentences padded on the right, and the target of each."""

    tokens_BL: Tensor
    """int64; token ids, `num_id` at numbers, 0 in the padding."""
    values_BL: Tensor
    """float32; values of the numbers, 0 elsewhere and for missing numbers."""
    known_BL: Tensor
    """bool; True at numbers that are not missing."""
    mask_BL: Tensor
    """bool; attention mask, False for padding."""
    target_B: Tensor
    """int64; the next token, or `num_id`."""
    value_B: Tensor
    """float32; the next number, 0 if none follows or it is missing."""
    known_B: Tensor
    """bool; True if a number follows that is not missing."""


@dataclass(frozen=True)
class Encoder:
    """Turns a sentence into a `Batch` without its first dimension."""

    encode: Encode
    num_id: int
    """Id of `<NUM>`: the vocabulary size of the backbone."""

    def __call__(self, sentence: Sentence) -> Batch:
        """Encodes one sentence; the target of a word is its first token."""
        tokens: list[int] = []
        values: list[float] = []
        for piece in sentence.pieces:
            ids = self.encode(piece) if isinstance(piece, str) else [self.num_id]
            tokens += ids
            values += [math.nan] * len(ids) if isinstance(piece, str) else [piece]
        target = sentence.target
        target_id = self.encode(target)[0] if isinstance(target, str) else self.num_id
        # Missing numbers are masked, so that a NaN in a batch always means a fault.
        known_L, values_L = _mask_missing(values)
        known_1, value_1 = _mask_missing([math.nan if isinstance(target, str) else target])
        return Batch(
            tokens_BL=torch.tensor(tokens),
            values_BL=values_L,
            known_BL=known_L,
            mask_BL=torch.ones(len(tokens), dtype=torch.bool),
            target_B=torch.tensor(target_id),
            value_B=value_1[0],
            known_B=known_1[0],
        )


def _mask_missing(values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Returns which values are not NaN, and the values with NaN replaced by 0."""
    tensor = torch.tensor(values, dtype=torch.float32)
    return ~tensor.isnan(), tensor.nan_to_num(nan=0.0)


class EncodedSentences(Dataset[Batch]):
    """Dataset of encoded sentences."""

    def __init__(self, sentences: Sequence[Sentence], encoder: Encoder) -> None:
        """Encodes every sentence once."""
        self._items = [encoder(sentence) for sentence in sentences]

    def __len__(self) -> int:
        """Returns the number of sentences."""
        return len(self._items)

    def __getitem__(self, index: int) -> Batch:
        """Returns one encoded sentence."""
        return self._items[index]


def collate(items: Sequence[Batch]) -> Batch:
    """Pads encoded sentences on the right and stacks them into one batch."""
    fields = [list(field) for field in zip(*items, strict=True)]
    padded = [pad_sequence(field, batch_first=True) for field in fields[:4]]
    return Batch(*padded, *(torch.stack(field) for field in fields[4:]))
