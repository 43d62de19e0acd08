"""How much of the memory of the host this process may take."""

import sys

import pytest

from lit_stability.training_state import free_memory
from lit_stability.training_state.free_memory import free_on_host


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine reports, each as a number or a list of numbers of bytes."""

    def set_to(available=10**6, groups=(), limits=(), **status):
        monkeypatch.setattr(free_memory, "_status", lambda: status)
        monkeypatch.setattr(free_memory, "_available", lambda: available)
        monkeypatch.setattr(free_memory, "free_in_groups", lambda: [*groups])
        monkeypatch.setattr(free_memory, "_address_limits", lambda: [*limits])

    return set_to


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_free_memory_is_what_a_limit_leaves_beyond_the_peak(machine):
    status = {"VmPeak": 600, "VmHWM": 5, "VmRSS": 3}
    machine(limits=[1000], **status)
    assert free_on_host() == 380
    machine(limits=[1000], groups=[102], **status)
    assert free_on_host() == 95


def test_ranks_on_one_machine_share_its_memory(machine):
    machine(available=400, VmHWM=50, VmRSS=30)
    assert (free_on_host(), free_on_host(sharers=4)) == (361, 76)


def test_memory_that_is_used_up_is_zero_and_not_less(machine):
    machine(groups=[10], VmHWM=500, VmRSS=100)
    assert free_on_host() == 0
