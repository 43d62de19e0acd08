"""Two ranks of which one has less memory or copies more slowly: both keep the same snapshots."""

import pytest
import torch

from tests.distributed import run_ranks_once
from tests.memory_rank_cases import CASES, memory_outcomes

TWO, ONE, NONE = ("device", "device"), ("device",), ()


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def ranks(request, tmp_path_factory):
    return run_ranks_once(tmp_path_factory, memory_outcomes, request.param, timeout=300)[1]


@pytest.mark.parametrize("case", CASES)
def test_ranks_keep_the_same_snapshots_at_the_same_places(case, ranks):
    one, other = (rank[case] for rank in ranks)
    assert one["seen"] == other["seen"]
    assert one["incidents"] == other["incidents"]


@pytest.mark.parametrize(
    ("case", "homes"),
    [
        ("plenty", TWO),
        ("little on rank 1", ONE),
        ("none on rank 1", NONE),
        ("fails on rank 1", ONE),
        ("budget", ONE),
    ],
)
def test_rank_with_the_least_memory_decides_for_all(case, homes, ranks):
    for rank in ranks:
        assert rank[case]["seen"][-1][0] == homes


@pytest.mark.parametrize("case", [c for c in CASES if c[:3] not in ("non", "not")])
def test_rollback_is_exact_whatever_one_rank_lacks(case, ranks):
    for rank in ranks:
        ((_, kind, step, _, responses, outcome),) = rank[case]["incidents"]
        assert (kind, step, outcome) == ("non-finite weight", 35, "recovered")
        assert responses == ["rolled back and replayed"]
        assert torch.equal(rank[case]["weights"], rank["bare"])


def test_healthy_ranks_without_any_snapshot_are_bit_identical_to_bare_ones(ranks):
    for rank in ranks:
        assert torch.equal(rank["none on rank 1"]["weights"], rank["bare"])


def test_copy_that_no_step_of_one_rank_waits_for_is_torn(ranks):
    """What the waits are for: otherwise the tests above would pass without them."""
    assert not torch.equal(ranks[1]["not awaited on rank 1"]["weights"], ranks[1]["bare"])


def test_snapshot_that_one_rank_wrote_to_while_it_was_copied_is_confirmed_on_none(ranks):
    for rank in ranks:
        assert {step for _, step in rank["slow on rank 1"]["seen"][:34]} == {0, 20}
        assert {step for _, step in rank["written on rank 1"]["seen"][:34]} == {0}


def test_log_names_the_rank_that_lacks_the_memory(ranks):
    (line,) = [x for x in ranks[0]["little on rank 1"]["log"] if "keeps one snapshot" in x]
    assert "of rank 1" in line
