"""The distance between snapshots: by what they cost, never shorter than promised."""

import pytest

from lit_stability.policies.snapshot_cadence import SnapshotCadence


def after(captures, capture, step, every=20, cost=0.002):
    """A cadence after captures of so many seconds, between steps of so many."""
    cadence = SnapshotCadence(every, cost)
    for each in [capture] * captures if isinstance(capture, float) else capture:
        cadence.stepped(step)
        cadence.captured(each if cadence.measures else None)
        if cadence.decides:
            cadence.agree([(cadence.wanted(), float("inf"))])
    return cadence


@pytest.mark.parametrize(
    ("capture", "step", "distance"),
    [
        (0.001, 1.0, 20),  # 0.005 % of the time
        (0.04, 1.0, 20),  # 0.2 %
        (0.05, 1.0, 40),  # 0.25 %
        (0.3, 1.0, 160),
        (1.0, 0.005, 320),  # an embedding table and small batches
        (0.002, 0.002, 20),  # a small model: 0.1 ms a step
        (0.05, 0.002, 320),
    ],
)
def test_distance_is_the_first_doubling_that_keeps_to_the_cost(capture, step, distance):
    assert after(6, capture, step).distance == distance


def test_distance_is_not_decided_before_the_captures_that_allocate_their_memory_are_over():
    assert after(5, 10.0, 0.1).distance == 20
    assert after(6, [10.0] * 3 + [0.001] * 3, 0.1).distance == 20


def test_one_slow_capture_changes_nothing():
    assert after(6, [0.001] * 4 + [10.0] + [0.001], 0.1).distance == 20


def test_snapshots_that_became_cheaper_are_taken_more_often_again_but_not_more_than_allowed():
    assert after(12, [1.0] * 6 + [0.05] * 6, 1.0).distance == 40
    assert after(12, [1.0] * 6 + [1e-6] * 6, 1.0).distance == 20


def test_few_decisions_are_made():
    cadence, decided = SnapshotCadence(20, 0.01), []
    cadence.stepped(1.0)
    for number in range(1, 101):
        cadence.captured(0.1 if cadence.measures else None)
        if cadence.decides:
            cadence.agree([(cadence.wanted(), 1e9)])
            decided.append(number)
    assert decided == [6, 12, 24, 48, 96]


def test_fixed_distance_is_never_measured():
    cadence = after(50, 10.0, 0.001, cost=None)
    assert (cadence.distance, cadence.longest) == (20, 20)
    assert not cadence.measures


@pytest.mark.parametrize(
    ("ranks", "distance"),
    [
        ([(20, 1e9), (160, 1e9)], 160),
        ([(160, 1e9), (20, 100)], 80),
        ([(160, 5), (160, 1e9)], 20),
    ],
)
def test_ranks_take_the_largest_distance_that_all_have_room_for(ranks, distance):
    cadence = SnapshotCadence(20, 0.01)
    cadence.agree(ranks)
    assert cadence.distance == distance
