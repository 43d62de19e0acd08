"""FSDP1, DeepSpeed and tensor parallelism: the faults of tests/test_ranks.py, and their own."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

from lit_stability import GradientMonitor, find_last_good, stability_callbacks
from lit_stability.faults import CorruptGradient, CorruptWeight, NanLoss
from tests import good_rank_cases as good
from tests.distributed import run_ranks, run_ranks_once
from tests.rank_cases import Net, fit_rank, incidents_of, outcomes, weights_of
from tests.test_ranks import AGAIN, BACK, BOTH, CLIP, SKIP, same_on_both_ranks

SHORT = {"max_steps": 25}
OF_16_BITS = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
ACCUMULATED = {"accumulate_grad_batches": 2, "max_steps": 25}
VALIDATED = {"val": True, "val_check_interval": 5, **SHORT}


class TwoGroups(Net):
    """Two groups with learning rates of their own, and frozen parameters."""

    def configure_optimizers(self):
        self.net[1].requires_grad_(False)
        head = {"params": self.net[4].parameters(), "weight_decay": 0.3}
        return torch.optim.AdamW([{"params": self.net[0].parameters(), "lr": 1e-3}, head], 1e-2)


class ByHand(Net):
    """Manual optimization."""

    def __init__(self, strategy, dropout=0.1):
        super().__init__(strategy, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers(), self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(float(loss.detach()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2, momentum=0.9)


OF_FSDP1 = {
    "accumulated": ACCUMULATED,
    "validated": VALIDATED,
    "clipped": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value", **SHORT},
    "bf16 policy": {"strategy": {"mixed_precision": OF_16_BITS}, **SHORT},
    "sharded gradients": {
        "strategy": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        **SHORT,
    },
    "not sharded": {"strategy": {"sharding_strategy": ShardingStrategy.NO_SHARD}, **SHORT},
}
OF_DEEPSPEED = {
    "accumulated": ACCUMULATED,
    "validated": VALIDATED,
    "clipped": {"gradient_clip_val": 0.05, **SHORT},
    "bf16": {"precision": "bf16-mixed", **SHORT},
    "bf16, true": {"precision": "bf16-true", **SHORT},
    "fp16": {"precision": "16-mixed", **SHORT},
    "two groups": {"module": TwoGroups, **SHORT},
    "by hand": {"module": ByHand, **SHORT},
    "offloaded": {"strategy": {"offload_optimizer": True}, **ACCUMULATED},
}
"""Of fits that meet one fault, and end like the bare one with the same options."""


def cases(weight, own):
    """All fits, with the faults of weights in this parameter."""
    found = {}
    for label, (faults, options) in BOTH.items():
        corrupt = (isinstance(fault, CorruptWeight | CorruptGradient) for fault in faults)
        pairs = zip(faults, corrupt, strict=True)
        found[label] = tuple(replace(f, parameter=weight) if c else f for f, c in pairs), options
    for label, options in own.items():
        fault = CorruptWeight(step=12, rank=1, parameter=weight)
        found[label] = ((NanLoss(step=12, rank=1) if label in RETRIED else fault,), options)
        found[f"{label}, bare"] = ((), {"suite": "none", **options})
    return found


RETRIED = ("accumulated", "fp16")
WEIGHT = "net.0.weight"
STAGES = [f"deepspeed {stage}" for stage in (1, 2, 3)]
ALL = {
    "fsdp1": cases(WEIGHT, OF_FSDP1),
    "fsdp1 flat": cases("net.0._flat_param", OF_FSDP1),
    **dict.fromkeys(STAGES, cases(WEIGHT, OF_DEEPSPEED)),
    "tensor": cases(WEIGHT, {"accumulated": ACCUMULATED, "validated": VALIDATED}),
}
# Ranks that compute one loss have neither batches of their own, nor a loss that is larger on one.
for label in ("four NaN batches", "loss spike twice"):
    del ALL["tensor"][label]
FEW = {k: ALL["fsdp1"][k] for k in ("bare", "clean", "NaN loss", "NaN weight")}


@pytest.fixture(
    scope="module",
    params=["few", *(pytest.param(name, marks=pytest.mark.long) for name in ALL)],
)
def ranks(request, tmp_path_factory):
    name = "fsdp1" if request.param == "few" else request.param
    if name in STAGES:
        pytest.importorskip("deepspeed")
    chosen = ALL.get(request.param, FEW)
    _, found = run_ranks_once(
        tmp_path_factory, outcomes, name, chosen, label=request.param, timeout=400
    )
    return found


def skip_without(ranks, label):
    """Skips a test of a fit that is not among the few."""
    if label not in ranks[0]:
        pytest.skip(f"without {label}")


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


FOUR = {
    label: (ALL["tensor"][label][0], {**ALL["tensor"][label][1], "devices": 4})
    for label in ("bare", "clean", "NaN loss", "NaN batch", "without batch 30", "NaN weight")
}


@pytest.mark.long
def test_tensor_and_data_parallel_ranks_recover_exactly_together(tmp_path):
    """Two by two: weights are sharded over both dimensions of the mesh."""
    ranks = run_ranks(
        outcomes, tmp_path, "tensor and data", FOUR, folder=tmp_path, ranks=4, timeout=300
    )
    for rank in ranks:
        assert torch.equal(rank["clean"]["weights"], rank["bare"]["weights"])
        for label, equal in (("NaN loss", "clean"), ("NaN weight", "clean")):
            assert torch.equal(rank[label]["weights"], rank[equal]["weights"])
            assert rank[label]["incidents"] == ranks[0][label]["incidents"] != []
        assert torch.equal(rank["NaN batch"]["weights"], rank["without batch 30"]["weights"])
    one = ranks[0]["clean"]
    for stats, norms in zip(one["stats"], one["norms"], strict=True):
        assert stats.grad_norms == pytest.approx(norms, rel=1e-5)


@pytest.mark.long
def test_batch_skipped_on_all_ranks_leaves_no_trace(ranks):
    """Invariant 2."""
    skip_without(ranks, "NaN batch")
    for label in ("NaN loss twice", "NaN batch"):
        expected = ranks[0]["without batch 30"]["weights"]
        assert torch.equal(ranks[0][label]["weights"], expected), label


@pytest.mark.long
def test_fault_leaves_no_trace_whatever_the_options(ranks):
    skip_without(ranks, "accumulated")
    for label in (k for k in ranks[0] if f"{k}, bare" in ranks[0]):
        one, other = (rank[label] for rank in ranks)
        assert len(one["incidents"]) == 1, label
        same_on_both_ranks(one, other)
        assert torch.equal(one["weights"], ranks[0][f"{label}, bare"]["weights"]), label


@pytest.mark.long
def test_rank_with_another_learning_rate_stops_the_run_with_that_reason(ranks):
    """Invariant 4: if no rollback helps, all ranks stop together."""
    skip_without(ranks, "learning rate")
    one, other = (rank["learning rate"] for rank in ranks)
    assert one == other
    assert "the ranks' learning rates differ" in one["stopped"]


def test_measured_norms_and_loss_are_those_of_all_ranks_together(ranks):
    """Also of a parameter of which a rank holds nothing."""
    one, other = (rank["clean"] for rank in ranks)
    for i, (stats, norms) in enumerate(zip(one["stats"], one["norms"], strict=True)):
        assert stats.grad_norms == pytest.approx(norms, rel=1e-5)
        assert stats.loss == pytest.approx((one["losses"][i] + other["losses"][i]) / 2, rel=1e-5)
    assert [s.grad_norms for s in one["stats"]] == [s.grad_norms for s in other["stats"]]
    measured = [s.weight_norm for s in one["stats"] if s.weight_norm][-1]
    assert measured == pytest.approx(float(one["weights"].norm()), rel=0.02)


ALONE = {
    label: (tuple(replace(f, rank=0) for f in faults), {**options, "devices": 1})
    for label, (faults, options) in FEW.items()
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["fsdp1", *STAGES])
def test_one_rank_alone_recovers_exactly(name, tmp_path):
    if name in STAGES:
        pytest.importorskip("deepspeed")
    (found,) = run_ranks(outcomes, tmp_path, name, ALONE, folder=tmp_path, ranks=1)
    assert found["NaN loss"]["incidents"] != []
    assert found["NaN weight"]["incidents"] != []
    for label in ALONE:
        assert torch.equal(found[label]["weights"], found["bare"]["weights"]), label


class DamageUsedWeights(Callback):
    """Writes a NaN into the weights of the module; the optimizer has others."""

    done = False

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == 12 and trainer.global_rank == 1 and not self.done:
            self.done = True
            parameter = next(pl_module.parameters())
            for held in (parameter, getattr(parameter, "ds_tensor", parameter)):
                if held.numel():
                    held.data.view(-1)[0] = torch.nan


def damaged_use(root, name):
    """Incidents and weights of a fit whose weights in use are damaged, and of a bare one."""
    suite = stability_callbacks()
    net, trainer = fit_rank(root / "suite", name, [DamageUsedWeights(), *suite], **SHORT)
    bare, bare_trainer = fit_rank(root / "bare", name, [], **SHORT)
    return incidents_of(suite), weights_of(net, trainer), weights_of(bare, bare_trainer)


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_damaged_weights_in_use_are_restored_with_those_of_the_optimizer(name, tmp_path):
    pytest.importorskip("deepspeed")
    for incidents, weights, bare in run_ranks(damaged_use, tmp_path, name, folder=tmp_path):
        assert [i[-2:] for i in incidents] == [(AGAIN + BACK, "recovered")]
        assert torch.equal(weights, bare)


def good_rank(root, name, kind):
    """A rank of a fit with `LastKnownGood`: whole, ended or preempted, or resumed after that."""
    fits = {
        "whole": lambda: good.fitted(root / kind, name, {}),
        "raises": lambda: good.ended(root / "raises", name, 21, "raise", (0, 1), {}),
        "after raises": lambda: good.resumed(root / "raises", name, {}),
        "preempted": lambda: good.preempted(root / "preempted", name, {}),
        "after preempted": lambda: good.after_preemption(root / "preempted", name, {}),
    }
    return fits[kind]()


@pytest.mark.long
@pytest.mark.parametrize("ends", ["raises", "preempted"])
@pytest.mark.parametrize("name", STAGES)
def test_fit_resumes_from_a_checkpoint_of_deepspeed_bit_for_bit(name, ends, tmp_path):
    pytest.importorskip("deepspeed")
    whole, _, resumed = (
        run_ranks(good_rank, tmp_path, name, kind, folder=tmp_path)
        for kind in ("whole", ends, f"after {ends}")
    )
    for one, other in zip(whole, resumed, strict=True):
        assert other["error"] is None
        assert other["step"] == one["step"]
        assert torch.equal(other["weights"], one["weights"])
        assert torch.equal(other["rng"], one["rng"])
        assert other["epochs"] == one["epochs"][-len(other["epochs"]) :]


@pytest.mark.long
def test_good_checkpoint_of_deepspeed_is_loaded_by_lightning_alone(tmp_path):
    """Whatever else is in the folder, it is a checkpoint of DeepSpeed's own format."""
    pytest.importorskip("deepspeed")
    run_ranks(good_rank, tmp_path, "deepspeed 2", "raises", folder=tmp_path)
    folder = find_last_good(tmp_path / "raises")
    assert {p.name for p in folder.iterdir()} >= {"checkpoint", "latest", "rank=0.json"}
    for step, weights in run_ranks(loaded_alone, tmp_path, folder, folder=tmp_path):
        assert step > 10
        assert torch.isfinite(weights).all()


def loaded_alone(root, folder):
    """The step and the weights of a fit without the suite that resumes and ends at once."""
    lightning = torch.load(folder / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=False)
    step = lightning["global_step"]
    options = {"resume": folder, "max_steps": step, "module": good.LoggingNet}
    net, trainer = fit_rank(root / "alone", "deepspeed 2", [], **options)
    return trainer.global_step, weights_of(net, trainer)


def refused(root, suite):
    """The error of a fit under DeepSpeed without ZeRO, and what was logged."""
    lines = good.Lines()
    callbacks = stability_callbacks() if suite else [GradientMonitor()]
    try:
        fit_rank(root, "deepspeed", callbacks, strategy={"stage": 0}, max_steps=5)
    except RuntimeError as error:
        return str(error), lines.stop()
    return None, lines.stop()


@pytest.mark.long
def test_deepspeed_without_zero_is_refused_with_advice_that_works(tmp_path):
    pytest.importorskip("deepspeed")
    for error, _ in run_ranks(refused, tmp_path / "suite", True, folder=tmp_path):
        assert "AnomalyCheckpoint does not support DeepSpeedOnCPU" in error
        assert "stages 1, 2 and 3 are supported" in error
        assert "use only GradientMonitor" in error
        assert "allow_strategies" not in error
    first, _ = run_ranks(refused, tmp_path / "monitor", False, folder=tmp_path)
    assert first[0] is None
    assert any("GradientMonitor measures nothing with DeepSpeedOnCPU" in x for x in first[1])
