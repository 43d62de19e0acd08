"""From sentences to padded batches, with a tokenizer of one id for each character."""

import math

import torch

from models.causal.batches import EncodedSentences, Encoder, collate
from models.causal.sentences import Sentence

NUM = 128
ENCODER = Encoder(lambda text: [ord(c) for c in text], num_id=NUM)


def rows(*sentences):
    return collate(list(EncodedSentences(sentences, ENCODER)))


def test_batch_puts_numbers_where_they_stand_and_pads_on_the_right():
    batch = rows(Sentence(("ab", 7.5, "c"), 3.0), Sentence(("d",), " xy"))
    assert batch.tokens_BL.tolist() == [[97, 98, NUM, 99], [100, 0, 0, 0]]
    assert batch.values_BL.tolist() == [[0, 0, 7.5, 0], [0, 0, 0, 0]]
    assert batch.mask_BL.tolist() == [[True] * 4, [True, False, False, False]]
    assert batch.target_B.tolist() == [NUM, ord(" ")]
    assert batch.known_BL.tolist() == [[False, False, True, False], [False] * 4]
    assert batch.value_B.tolist() == [3.0, 0.0]
    assert batch.known_B.tolist() == [True, False]
    assert batch.tokens_BL.dtype == torch.int64


def test_missing_number_stays_a_number_of_unknown_value():
    batch = rows(Sentence(("a", math.nan), math.nan))
    assert batch.tokens_BL.tolist() == [[97, NUM]]
    assert batch.values_BL.tolist() == [[0.0, 0.0]]
    assert not batch.known_BL.any()
    assert batch.target_B.tolist() == [NUM]
    assert batch.value_B.tolist() == [0.0]
    assert not batch.known_B.any()
