"""The replay ring alone: which batches are recorded, dropped and replayed, and in which order."""

import numpy as np
import pytest
import torch

from lit_stability.measurement.tensor_tree import size_of
from lit_stability.trainer_internals import RecordedBatch, ReplayRing
from lit_stability.trainer_internals.batch_digest import digest_of


def ring_of(count, max_bytes=10**6):
    ring = ReplayRing(max_bytes, clone=False)
    entries = [RecordedBatch(i, 0, i, {"after": i}, 8, ()) for i in range(count)]
    for entry in entries:
        ring.add(entry)
    return ring, entries


def queued(ring):
    return [(e.item, e.rng is not None) for e in ring.queue]


@pytest.mark.parametrize(
    ("position", "skipped", "queue"),
    [
        # Batches before the first skipped one come with their generators, those after without.
        (2, [], [(2, True), (3, True), (4, True)]),
        (2, [3], [(2, True), (4, False)]),
        (2, [2], [(3, False), (4, False)]),
        (2, [4], [(2, True), (3, True)]),
        (0, [1, 3], [(0, True), (2, False), (4, False)]),
        (5, [], []),
    ],
)
def test_rewind_queues_all_batches_since_a_position_except_skipped_ones(position, skipped, queue):
    ring, entries = ring_of(5)
    ring.rewind(position, [entries[i] for i in skipped])
    assert queued(ring) == queue
    assert ring.position == position
    assert ring.skipped[0] == len(skipped)
    assert ring.nbytes == 8 * position


def test_rewind_during_a_replay_queues_served_batches_before_waiting_ones():
    ring, _ = ring_of(5)
    ring.rewind(1)
    for _ in range(2):
        ring.add(ring.queue.popleft())
    ring.rewind(2)
    assert [item for item, _ in queued(ring)] == [2, 3, 4]


def test_bytes_are_bounded_and_dropped_batches_cannot_be_replayed():
    ring, _ = ring_of(10, max_bytes=40)
    assert (ring.nbytes, ring.first, ring.position) == (40, 5, 10)
    assert ring.replayable(5)
    assert not ring.replayable(4)
    with pytest.raises(LookupError, match="batches before 5 were dropped, 4 requested"):
        ring.since(4)


def test_one_batch_larger_than_the_bound_is_kept_alone():
    ring, _ = ring_of(3, max_bytes=1)
    assert (ring.first, len(ring.entries)) == (2, 1)


def test_prune_drops_the_entries_before_a_position():
    ring, _ = ring_of(6)
    ring.prune(4)
    assert (ring.first, [e.item for e in ring.entries]) == (4, [4, 5])
    ring.prune(2)
    assert ring.first == 4


def test_modified_batch_is_detected_and_only_replayable_without_it():
    ring = ReplayRing(10**6, clone=False)
    batch = {"x": torch.zeros(3), "y": [torch.zeros(2)]}
    entry = RecordedBatch(batch, 0, 0, None, size_of(batch), digest_of(batch))
    ring.add(entry)
    ring.check_modified()
    assert ring.replayable(0)
    batch["y"][0].add_(1)
    ring.check_modified()
    assert not ring.replayable(0)
    assert ring.replayable(0, skipped=[entry])


def recorded(batch):
    return RecordedBatch(batch, 0, 0, None, size_of(batch), digest_of(batch))


@pytest.mark.parametrize("modified_from", [0, 5])
def test_copies_are_kept_from_the_first_modified_batch_on(modified_from):
    """The first batches are copied in any case, so that a step that always writes loses none."""
    ring = ReplayRing(10**6, clone=False)
    entries = [recorded([torch.full((2,), float(i))]) for i in range(8)]
    for i, entry in enumerate(entries):
        served = ring.serve(entry)
        if i >= modified_from:
            served[0].add_(100)
        ring.check_modified()
    assert [e.modified for e in entries] == [i == modified_from == 5 for i in range(8)]
    assert [float(e.item[0][0]) for e in entries] == [
        i + 100 * (i == modified_from == 5) for i in range(8)
    ]


def test_replayed_batch_is_unchanged_however_often_it_is_modified():
    ring = ReplayRing(10**6, clone=False)
    ring.serve(recorded({"x": np.zeros(2)}))["x"] += 1
    for _ in range(3):
        ring.check_modified()
        ring.rewind(0)
        served = ring.serve_again(ring.queue.popleft())
        assert served["x"].tolist() == [0, 0]
        served["x"] += 1


def test_batch_that_cannot_be_copied_is_served_and_not_replayable_once_modified():
    class Handle:
        def __init__(self):
            self.x = torch.zeros(2)

        def __deepcopy__(self, memo):
            raise TypeError("a connection cannot be copied")

    ring = ReplayRing(10**6, clone=True)
    ring.serve(recorded(Handle())).x.add_(1)
    ring.check_modified()
    assert not ring.replayable(0)


def test_size_counts_tensors_in_containers_and_batch_objects():
    class Batch:
        def __init__(self):
            self.x, self.others = torch.zeros(4), {"y": torch.zeros(2, dtype=torch.int64)}

    assert size_of([Batch(), (torch.zeros(1),), "text"]) == 16 + 16 + 4
