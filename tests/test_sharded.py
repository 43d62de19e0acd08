"""FSDP1 on two ranks: the faults of tests/test_ranks.py, and what is its own."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

from lit_stability.faults import CorruptGradient, CorruptWeight, NanLoss
from tests.distributed import run_ranks_once
from tests.rank_cases import outcomes
from tests.test_ranks import AGAIN, BACK, BOTH, CLIP, SKIP, same_on_both_ranks

SHORT = {"max_steps": 25}
OF_16_BITS = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
OPTIONS = {
    "accumulated": {"accumulate_grad_batches": 2, "max_steps": 25},
    "validated": {"val": True, "val_check_interval": 5, **SHORT},
    "clipped": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value", **SHORT},
    "bf16 policy": {"strategy": {"mixed_precision": OF_16_BITS}, **SHORT},
    "sharded gradients": {
        "strategy": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        **SHORT,
    },
    "not sharded": {"strategy": {"sharding_strategy": ShardingStrategy.NO_SHARD}, **SHORT},
}
"""Of fits that meet one fault, and end like the bare one with the same options."""


def cases(weight):
    """All fits, with the faults of weights in this parameter."""
    found = {}
    for label, (faults, options) in BOTH.items():
        corrupt = (isinstance(fault, CorruptWeight | CorruptGradient) for fault in faults)
        pairs = zip(faults, corrupt, strict=True)
        found[label] = tuple(replace(f, parameter=weight) if c else f for f, c in pairs), options
    for label, options in OPTIONS.items():
        fault = CorruptWeight(step=12, rank=1, parameter=weight)
        found[label] = ((NanLoss(step=12, rank=1) if "acc" in label else fault,), options)
        found[f"{label}, bare"] = ((), {"suite": "none", **options})
    return found


ALL = {"fsdp1": cases("net.0.weight"), "fsdp1 flat": cases("net.0._flat_param")}
FEW = {k: ALL["fsdp1"][k] for k in ("bare", "clean", "NaN loss", "NaN weight")}


@pytest.fixture(
    scope="module",
    params=["few", *(pytest.param(name, marks=pytest.mark.long) for name in ALL)],
)
def ranks(request, tmp_path_factory):
    name = "fsdp1" if request.param == "few" else request.param
    chosen = ALL.get(request.param, FEW)
    _, found = run_ranks_once(
        tmp_path_factory, outcomes, name, chosen, label=request.param, timeout=400
    )
    return found


def present(ranks, labels):
    """Those of the fits that were run."""
    found = [label for label in labels if label in ranks[0]]
    assert found
    return found


def test_healthy_fit_is_bit_identical_to_the_bare_one(ranks):
    """Invariant 1."""
    for rank in ranks:
        assert rank["clean"]["incidents"] == []
        assert torch.equal(rank["clean"]["weights"], rank["bare"]["weights"])
        assert rank["clean"]["losses"] == rank["bare"]["losses"]


RESPONSES = {
    "NaN loss": ("non-finite loss", AGAIN),
    "NaN loss twice": ("non-finite loss", AGAIN + SKIP),
    "NaN batch": ("non-finite loss", SKIP),
    "four NaN batches": ("non-finite loss", (AGAIN + SKIP) * 4),
    "loss spike": ("gradient spike", AGAIN),
    "loss spike twice": ("gradient spike", AGAIN + CLIP),
    "NaN weight": ("non-finite weight", BACK),
    "flipped bit": ("non-finite weight", BACK),
    "zeroed moment": ("optimizer state", BACK),
    "scaled gradients": ("gradient spike", AGAIN),
    "NaN gradient": ("non-finite gradient", AGAIN),
}


def test_fault_on_one_rank_gets_the_same_response_on_both(ranks):
    """Invariant 5."""
    for label in present(ranks, RESPONSES):
        kind, responses = RESPONSES[label]
        one, other = (rank[label] for rank in ranks)
        assert one["incidents"] == [(1, kind, 30, len(responses), responses, "recovered")]
        same_on_both_ranks(one, other)


def test_transient_fault_leaves_no_trace(ranks):
    """Invariant 7."""
    transient = [k for k, (_, responses) in RESPONSES.items() if responses in (AGAIN, BACK)]
    for label in present(ranks, transient):
        assert torch.equal(ranks[0][label]["weights"], ranks[0]["clean"]["weights"]), label


@pytest.mark.long
def test_batch_skipped_on_all_ranks_leaves_no_trace(ranks):
    """Invariant 2."""
    for label in ("NaN loss twice", "NaN batch") if "NaN batch" in ranks[0] else ():
        expected = ranks[0]["without batch 30"]["weights"]
        assert torch.equal(ranks[0][label]["weights"], expected), label


@pytest.mark.long
def test_fault_leaves_no_trace_whatever_the_options(ranks):
    for label in OPTIONS if "clipped" in ranks[0] else ():
        one, other = (rank[label] for rank in ranks)
        assert len(one["incidents"]) == 1, label
        same_on_both_ranks(one, other)
        assert torch.equal(one["weights"], ranks[0][f"{label}, bare"]["weights"]), label


def test_measured_norms_and_loss_are_those_of_all_ranks_together(ranks):
    """Also of a parameter of which a rank holds nothing."""
    one, other = (rank["clean"] for rank in ranks)
    for i, (stats, norms) in enumerate(zip(one["stats"], one["norms"], strict=True)):
        assert stats.grad_norms == pytest.approx(norms, rel=1e-5)
        assert stats.loss == pytest.approx((one["losses"][i] + other["losses"][i]) / 2, rel=1e-5)
    assert [s.grad_norms for s in one["stats"]] == [s.grad_norms for s in other["stats"]]
    measured = [s.weight_norm for s in one["stats"] if s.weight_norm][-1]
    assert measured == pytest.approx(float(one["weights"].norm()), rel=0.02)
