"""Encoding, padding and the order of an epoch, T5."""

import pytest

from models.translation.batches import EncodedPairs, LengthSortedSampler, collate
from models.translation.pairs import Pair
from models.translation.vocabulary import Vocabulary


def test_collate_pads_both_sides_on_the_right():
    rows = EncodedPairs([Pair("王怒", "王"), Pair("王", "王怒怒")], Vocabulary("王怒"))
    assert len(rows) == 2
    batch = collate([rows[0], rows[1]])
    assert batch.source_BS.tolist() == [[4, 5, 2], [4, 2, 0]]
    assert batch.target_BT.tolist() == [[1, 4, 2, 0, 0], [1, 4, 5, 5, 2]]


@pytest.fixture
def lengths():
    return [(i * 7 % 20, i * 3 % 5) for i in range(205)]


def test_sampler_gives_every_index_once(lengths):
    sampler = LengthSortedSampler(lengths, batch_size=10, seed=0)
    assert sorted(sampler) == list(range(len(sampler)))


def test_sampler_order_depends_on_seed_and_epoch_alone(lengths):
    first, again, other = (
        LengthSortedSampler(lengths, batch_size=10, seed=seed) for seed in (0, 0, 1)
    )
    assert list(first) == list(again) == list(first)
    assert list(first) != list(other)
    before = list(first)
    first.set_epoch(1)
    assert list(first) != before
    again.set_epoch(1)
    assert list(first) == list(again)


def test_sampler_batches_have_like_lengths(lengths):
    """The mean spread within a batch is far below that of the data, 19."""
    order = list(LengthSortedSampler(lengths, batch_size=10, seed=0))
    batches = [[lengths[i][0] for i in order[k : k + 10]] for k in range(0, 205, 10)]
    assert [len(batch) for batch in batches] == [10] * 20 + [5]
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 3


def test_sampler_of_nothing_is_empty():
    assert list(LengthSortedSampler([], batch_size=4, seed=0)) == []
