"""Batches that are left out of the training data, on one rank and on several."""

from lit_stability.trainer_internals.skip_batches import SkippingLoader

BATCHES = {0: [[0, 1], [4, 5], [8, 9], [12, 13]], 1: [[2, 3], [6, 7], [10, 11], [14, 15]]}
"""Of each rank, as a distributed sampler deals them out."""


def test_batch_that_one_rank_skips_is_skipped_by_all_ranks():
    unwanted = [frozenset([6, 7])]
    told = [[], [1]]  # what the two ranks find in their own batches
    found, heard = {}, {}
    for rank, batches in BATCHES.items():

        def gather(own, rank=rank):
            heard[rank] = own
            return told

        sampler = SkippingLoader(batches, unwanted, gather=gather)
        found[rank] = list(sampler), sampler.skipped
    assert [heard[0], heard[1]] == told
    assert found[0] == ([[0, 1], [8, 9], [12, 13]], 1)
    assert found[1] == ([[2, 3], [10, 11], [14, 15]], 1)


def test_ranks_exchange_nothing_where_no_batch_is_unwanted():
    def gather(own):
        raise AssertionError("no rank calls it")

    assert list(SkippingLoader(BATCHES[0], gather=gather)) == BATCHES[0]
