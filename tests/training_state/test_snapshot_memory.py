"""Which snapshots are kept where, from numbers of bytes."""

import pytest

from lit_stability.training_state.snapshot_memory import Memory, Needs, choose_homes, tiers_for

TWO = ("device", "device")


@pytest.mark.parametrize(
    ("device", "host", "homes"),
    [
        (None, 30, TWO),
        (None, 15, ("device",)),
        (None, 1, ()),
        (25, 0, TWO),
        (15, 15, ("device", "host")),
        (5, 30, ("host", "host")),
        (5, 15, ("host",)),
        (15, 5, ("device",)),
        (0, 0, ()),
    ],
)
def test_homes_of_snapshots_of_ten_bytes_follow_the_free_memory(device, host, homes):
    tiers = tiers_for("auto", on_accelerator=device is not None)
    found = choose_homes([(Needs(10), Memory(device, host))], tiers)
    assert found.of == homes
    assert bool(found.reason) == (homes != TWO)


@pytest.mark.parametrize(
    ("needs", "device", "host", "homes"),
    [
        (Needs(10, batches=5), None, 24, ("device",)),
        (Needs(10, batches=5, batches_held=5), None, 24, TWO),
        (Needs(10, incident=5), None, 24, ("device",)),
        (Needs(10, incident=5), 24, 10, ("device", "host")),
        (Needs(10, batches=5), 24, 0, TWO),
        (Needs(10, batches=5), 5, 24, ("host",)),
        (Needs(10, batches=50), None, 24, ("device",)),
        (Needs(10, frozen=50), None, 24, TWO),
    ],
)
def test_homes_leave_room_for_batches_on_the_host_and_for_incidents_on_the_device(
    needs, device, host, homes
):
    tiers = tiers_for("auto", on_accelerator=device is not None)
    assert choose_homes([(needs, Memory(device, host))], tiers).of == homes


@pytest.mark.parametrize(
    ("needs", "budget", "homes"),
    [
        (Needs(10), 20, TWO),
        (Needs(10), 19, ("device",)),
        (Needs(10), 9, ()),
        (Needs(10, frozen=5), 24, ("device",)),
        (Needs(10, incident=5), 24, ("device",)),
        (Needs(10, batches=5, batches_held=5), 24, ("device",)),
        (Needs(10, batches=50), 24, ("device",)),
        (Needs(10, batches=50, incident=15), 24, ()),
    ],
)
def test_budget_counts_all_that_the_suite_holds(needs, budget, homes):
    memory = Memory(None, 1000, budget)
    found = choose_homes([(needs, memory)], tiers_for("auto", on_accelerator=False))
    assert found.of == homes
    assert ("memory_budget" in found.reason) == (homes != TWO)


def test_ranks_take_the_best_choice_that_all_have_the_memory_for():
    first, second = (Needs(10), Memory(15, 15)), (Needs(10), Memory(5, 30))
    assert choose_homes([first]).of == ("device", "host")
    assert choose_homes([second]).of == ("host", "host")
    found = choose_homes([first, second])
    assert found.of == ("host",), "neither both on the device of one nor on the host of the other"
    assert found.reason.endswith("of rank 0")


def test_reason_names_the_rank_that_lacks_the_memory():
    enough, little = (Needs(2**30), Memory(2**32, 0)), (Needs(2**30), Memory(0, 2**20))
    assert str(choose_homes([enough, enough, little])) == (
        "no snapshot, as none fits into 0 MiB on the device and 1 MiB on the host of rank 2"
    )


@pytest.mark.parametrize(
    ("where", "accelerator", "tiers"),
    [
        ("device", True, (TWO, ("device",), ())),
        ("host", True, (("host", "host"), ("host",), ())),
        ("host", False, (("host", "host"), ("host",), ())),
        ("auto", False, (TWO, ("device",), ())),
    ],
)
def test_wish_of_the_user_leaves_only_that_memory(where, accelerator, tiers):
    assert tiers_for(where, on_accelerator=accelerator) == tiers
