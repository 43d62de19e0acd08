"""S9 on two ranks: what one cannot compute in its precision, both compute in another."""

import pytest
import torch

from tests.distributed import run_ranks_once
from tests.precision_rank_cases import all_cases


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_ranks_once(tmp_path_factory, all_cases, "ddp")[1]


def test_overflow_on_one_rank_lowers_the_precision_of_both_and_costs_no_batch(ddp):
    """As if the run had begun in bf16: the same weights on both, to the bit."""
    one, other = (rank["ddp fp16"] for rank in ddp)
    assert one["precision"] == other["precision"] == "bf16-mixed"
    assert one["incidents"] == other["incidents"]
    ((_, kind, step, occurrences, responses, outcome),) = one["incidents"]
    assert (kind, step, occurrences, outcome) == ("non-finite loss", 0, 1, "recovered")
    assert responses == ["precision 16-mixed -> bf16-mixed", "step retried"]
    assert one["evidence"] == other["evidence"]
    assert any(line.startswith("rank 1: run again in 16-mixed") for line in one["evidence"][0])
    assert torch.equal(one["weights"], other["weights"])
    assert torch.equal(one["weights"], ddp[0]["ddp begun in bf16"]["weights"])


def test_module_that_overflows_on_one_rank_is_an_island_on_both(ddp):
    one, other = (rank["ddp island"] for rank in ddp)
    assert one["precision"] == other["precision"] == "16-mixed"
    assert one["islands"] == other["islands"] == ["net.0"]
    assert one["incidents"] == other["incidents"]
    assert one["incidents"][0][4] == ["net.0 kept in fp32", "step retried"]
    assert torch.equal(one["weights"], other["weights"])


def test_half_precision_weights_are_converted_on_both_ranks_which_stay_equal(ddp):
    """Without a new wrapper the buckets would be of the old format, and the ranks drift apart."""
    one, other = (rank["ddp bf16 weights"] for rank in ddp)
    assert one["precision"] == "bf16-mixed"
    assert one["formats"] == {"torch.float32"}
    assert one["incidents"] == other["incidents"]
    assert [row[1] for row in one["incidents"]] == ["lost updates"]
    assert torch.equal(one["weights"], other["weights"])
    assert torch.isfinite(one["weights"]).all()


def test_sharded_weights_are_taken_again_by_all_ranks_together(tmp_path_factory):
    """FSDP2: the weights are gathered for the proof, and their gradients set aside meanwhile."""
    ranks = run_ranks_once(tmp_path_factory, all_cases, "fsdp2")[1]
    one, other = (rank["fsdp2 bf16"] for rank in ranks)
    assert one["precision"] == other["precision"] == "32-true"
    assert one["incidents"] == other["incidents"]
    assert one["incidents"][0][4] == ["precision bf16-mixed -> 32-true", "step retried"]
    assert torch.equal(one["weights"], ranks[0]["fsdp2 begun in fp32"]["weights"])
