"""A fault on one of two ranks: both detect it, respond in the same way, and stay in sync."""

import json
import warnings

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from lit_stability import (
    AnomalyCheckpoint,
    AutoRollback,
    GradientMonitor,
    PrecisionFallback,
    stability_callbacks,
)
from lit_stability.faults import (
    BadBatch,
    CorruptGradient,
    CorruptMoment,
    CorruptWeight,
    FaultInjector,
    JumpLearningRate,
    NanLoss,
    ScaleGradients,
    ScaleLoss,
)
from lit_stability.trainer_internals import sharing
from tests.conftest import Regression, make_trainer
from tests.distributed import run_ranks, run_ranks_once
from tests.rank_cases import Manual, Recorder, fit_rank, incidents_of, outcomes, whole

AGAIN, SKIP, CLIP = ["step retried"], ["step skipped"], ["gradients clipped"]
BACK = ["rolled back and replayed"]
APART = "rank disagreement"
WEIGHT = "net.0.weight"

BOTH = {
    "bare": ((), {"suite": "none"}),
    "clean": ((), {}),
    "without batch 30": ((), {"skipped": (30,)}),
    "NaN loss": ((NanLoss(step=30, rank=1),), {}),
    "NaN loss twice": ((NanLoss(step=30, steps=2, rank=1),), {}),
    "NaN batch": ((BadBatch(step=30, rank=1),), {}),
    "four NaN batches": ((), {"nan": range(30, 34)}),
    "loss spike": ((ScaleLoss(step=30, rank=1),), {}),
    "loss spike twice": ((ScaleLoss(step=30, steps=2, rank=1),), {}),
    "NaN weight": ((CorruptWeight(step=30, rank=1, parameter=WEIGHT),), {}),
    "flipped bit": ((CorruptWeight(step=30, rank=1, parameter=WEIGHT, bit=30),), {}),
    "zeroed moment": ((CorruptMoment(step=30, rank=1),), {}),
    "scaled gradients": ((ScaleGradients(step=30, rank=1),), {}),
    "NaN gradient": ((CorruptGradient(step=30, rank=1, parameter=WEIGHT),), {}),
    "learning rate": ((JumpLearningRate(step=30, rank=1),), {}),
}
DDP = {
    **BOTH,
    "scaled on rank 0": ((ScaleGradients(step=30, rank=0),), {}),
    "one element": ((CorruptGradient(step=30, rank=1, parameter=WEIGHT, value=0.3),), {}),
    "checkpoints": ((ScaleGradients(step=30, rank=1),), {"checkpoint": True}),
    "observed": ((CorruptGradient(step=30, rank=1),), {"suite": "monitor"}),
    "last step": ((ScaleGradients(step=49, rank=1),), {}),
    "accumulation": ((NanLoss(step=12, rank=1),), {"accumulate_grad_batches": 2, "max_steps": 25}),
    "fp16": ((NanLoss(step=30, rank=1),), {"fp16": True}),
    "clipped": ((), {"gradient_clip_val": 1.0, "recorded": False}),
    "clipped bare": ((), {"gradient_clip_val": 1.0, "recorded": False, "suite": "none"}),
    "two optimizers": ((ScaleGradients(step=60, rank=1),), {"module": Manual, "max_steps": 100}),
}
FSDP2 = {**BOTH, "validation": ((), {"val": True, "val_check_interval": 10})}
RUNS = {"ddp": DDP, "fsdp2": FSDP2}
LONG = {
    "ddp": ("NaN loss", "NaN weight", "loss spike twice", "scaled gradients"),
    "fsdp2": ("NaN loss twice", "four NaN batches", "loss spike", "flipped bit", "zeroed moment",
              "NaN gradient"),
}  # fmt: skip
"""Cases that only the long tests run. CI has each case under one strategy at least, and each kind
of response under both."""

OF_THREE = {"devices": 3, "max_steps": 40}
THREE = {
    "clean": ((), OF_THREE),
    "NaN weight, step 2": ((CorruptWeight(step=2, rank=1, parameter="net.4.weight"),), OF_THREE),
    "NaN weight, step 5": ((CorruptWeight(step=5, rank=1, parameter="net.4.weight"),), OF_THREE),
    "NaN weight, step 24": ((CorruptWeight(step=24, rank=2, parameter="net.4.weight"),), OF_THREE),
    "NaN loss, step 12": ((NanLoss(step=12, rank=2),), OF_THREE),
    "NaN loss, step 0": ((NanLoss(step=0, rank=1),), OF_THREE),
    "NaN weight, step 1": ((CorruptWeight(step=1, rank=1, parameter="net.4.weight"),), OF_THREE),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run_ranks_once(tmp_path_factory, outcomes, "ddp", THREE, ranks=3, label="three")


def run_cases(tmp_path_factory, strategy, long=False):
    cases = {k: v for k, v in RUNS[strategy].items() if (k in LONG[strategy]) == long}
    label = "-long" if long else ""
    return run_ranks_once(tmp_path_factory, outcomes, strategy, cases, label=label)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_cases(tmp_path_factory, "ddp")


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return run_cases(tmp_path_factory, "fsdp2")


@pytest.fixture(params=["ddp", "fsdp2"])
def both(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def of_both(both, request, tmp_path_factory):
    """The results of each rank, those of the long cases too in a long test."""
    strategy = request.node.callspec.params["both"]
    if request.node.callspec.params["case"] not in LONG[strategy]:
        return both[1]
    _, more = run_cases(tmp_path_factory, strategy, long=True)
    return [short | long for short, long in zip(both[1], more, strict=True)]


def each_of_both(*cases, strategies=("ddp", "fsdp2")):
    """Parametrizes a test by strategy and case."""
    cells = [
        pytest.param(strategy, case, marks=[pytest.mark.long] if case in LONG[strategy] else [])
        for strategy in strategies
        for case in cases
    ]
    return pytest.mark.parametrize(("both", "case"), cells, indirect=["both"])


RESPONSES = {
    "NaN loss": ("non-finite loss", AGAIN),
    "NaN loss twice": ("non-finite loss", AGAIN + SKIP),
    # The fault writes into rank 1's batch: where one cannot replay, nobody does.
    "NaN batch": ("non-finite loss", SKIP),
    # One rank's batches are to blame: no rank draws other random numbers for them.
    "four NaN batches": ("non-finite loss", (AGAIN + SKIP) * 4),
    "loss spike": ("gradient spike", AGAIN),
    "loss spike twice": ("gradient spike", AGAIN + CLIP),
    "NaN weight": ("non-finite weight", BACK),
    "flipped bit": ("non-finite weight", BACK),
    "zeroed moment": ("optimizer state", BACK),
}


@each_of_both(*RESPONSES)
def test_fault_on_one_rank_gets_the_same_response_on_both_at_the_same_step(case, of_both):
    """Invariant 5."""
    kind, responses = RESPONSES[case]
    one, other = (rank[case] for rank in of_both)
    assert one["incidents"] == [(1, kind, 30, len(responses), responses, "recovered")]
    same_on_both_ranks(one, other)


def same_on_both_ranks(one, other):
    for key in ("incidents", "messages", "evidence", "state", "step", "steps"):
        assert one[key] == other[key], key
    assert torch.equal(one["weights"], other["weights"])
    assert torch.isfinite(one["weights"]).all()
    # A step that the ranks disagree on was accepted by one of them before it was undone.
    assert [s.loss for s in one["stats"][-15:]] == [s.loss for s in other["stats"][-15:]]


@each_of_both("NaN loss twice", "NaN batch")
def test_batch_skipped_on_all_ranks_leaves_no_trace(case, of_both):
    """Invariant 2: weights of all ranks, rank 0's buffers, which DDP hands round, the count."""
    equals_run_without_fault(of_both, case, "without batch 30")


@each_of_both("NaN loss", "loss spike", "NaN weight", "flipped bit", "zeroed moment")
def test_transient_fault_leaves_no_trace(case, of_both):
    """Invariant 7."""
    equals_run_without_fault(of_both, case, "clean")


@each_of_both("scaled gradients", "NaN gradient", "one element", "checkpoints", strategies=["ddp"])
def test_disagreement_leaves_no_trace(case, of_both):
    """Invariant 7."""
    equals_run_without_fault(of_both, case, "clean")


def equals_run_without_fault(ranks, case, clean):
    for rank in ranks:
        assert torch.equal(rank[case]["weights"], rank[clean]["weights"])
        assert rank[case]["step"] == rank[clean]["step"]
    assert torch.equal(ranks[0][case]["buffers"], ranks[0][clean]["buffers"])


def test_healthy_ranks_with_the_suite_are_bit_identical_to_those_without(both):
    """Invariant 1."""
    for rank in both[1]:
        assert rank["clean"]["incidents"] == []
        assert torch.equal(rank["clean"]["weights"], rank["bare"]["weights"])
        assert torch.equal(rank["clean"]["buffers"], rank["bare"]["buffers"])
        assert rank["clean"]["losses"] == rank["bare"]["losses"]


def test_ranks_that_clip_with_the_measured_norm_are_bit_identical_to_bare_ones(ddp):
    """Invariant 1."""
    for rank in ddp[1]:
        assert torch.equal(rank["clipped"]["weights"], rank["clipped bare"]["weights"])
        assert not torch.equal(rank["clipped"]["weights"], rank["bare"]["weights"])


def test_measured_norms_and_loss_are_those_of_all_ranks_together(both):
    """Invariant 5: also where a rank holds an uneven shard, or none."""
    one, other = (rank["clean"] for rank in both[1])
    for i, (stats, norms) in enumerate(zip(one["stats"], one["norms"], strict=True)):
        assert stats.grad_norms == pytest.approx(norms, rel=1e-5)
        assert stats.loss == pytest.approx((one["losses"][i] + other["losses"][i]) / 2, rel=1e-5)
    assert [s.grad_norms for s in one["stats"]] == [s.grad_norms for s in other["stats"]]
    scans = [s.weight_norm for s in one["stats"] if s.weight_norm]
    assert len(scans) == 5
    assert [s.update_ratio for s in one["stats"]] == [s.update_ratio for s in other["stats"]]


def test_last_scan_measures_the_norm_of_the_whole_weights(both):
    """At the 50th step, before its update: an update away from the weights at the end."""
    rank = both[1][0]["clean"]
    measured = [s.weight_norm for s in rank["stats"] if s.weight_norm][-1]
    assert measured == pytest.approx(float(rank["weights"].norm()), rel=0.02)


GATHER = "all_gather_object"
COPIES = {
    "ddp": {0: 2 + 1 + 2, 10: 1, 20: 2, 40: 1},
    "fsdp2": {0: 2 + 1, 1: 2, 11: 1, 20: 2, 40: 1},
}
"""How often the ranks gather before a batch. Snapshots at 0, 20 and 40: the memory of each, until
it is decided where snapshots are kept, and whether all have captured it. A copy of `LastKnownGood`
at the first step: whether all can write, whether all have captured it, and, ten steps later,
whether all have it still. Before the first batch: whether all have a step to verify."""


def calls_of_steps(rank, strategy):
    """The collectives of the first batch and of the others, without those of the copies."""
    calls = list(rank["clean"]["calls"])
    for step, count in COPIES[strategy].items():
        assert calls[step][:count] == (GATHER,) * count
        calls[step] = calls[step][count:]
    return calls[0], set(calls[1:])


def test_healthy_step_under_ddp_asks_for_two_collectives_and_waits_for_neither_at_once(ddp):
    """The first step is also the attention probe's turn, what ranks have read is gathered."""
    for rank in ddp[1]:
        first, others = calls_of_steps(rank, "ddp")
        assert first == ("all_reduce async", GATHER, "all_reduce async")
        assert others == {("all_reduce async",) * 2}


def test_healthy_step_under_fsdp2_asks_for_one_collective(fsdp2):
    for rank in fsdp2[1]:
        first, others = calls_of_steps(rank, "fsdp2")
        assert first == ("all_reduce async", GATHER)
        assert others == {("all_reduce async",)}


DISAGREEMENTS = {
    "scaled gradients": "rank 1 rejects its gradients, the others do not",
    "NaN gradient": "rank 1 rejects its gradients, the others do not",
    "scaled on rank 0": "rank 0 rejects its gradients, the others do not",
    "one element": "the ranks' averaged gradients differ",
    "checkpoints": "rank 1 rejects its gradients, the others do not",
}


@each_of_both(*DISAGREEMENTS, strategies=["ddp"])
def test_gradient_damaged_after_averaging_is_a_disagreement_that_all_roll_back(case, of_both):
    """Invariant 5: no rank waits for a rank that has detected nothing."""
    message = DISAGREEMENTS[case]
    one, other = (rank[case] for rank in of_both)
    assert one["incidents"] == [(1, APART, 30, 1, BACK, "recovered")]
    assert one["messages"][0].startswith(message)
    same_on_both_ranks(one, other)


@each_of_both("scaled gradients", "NaN gradient", strategies=["fsdp2"])
def test_gradient_shard_that_is_damaged_is_seen_by_all_before_the_update(case, of_both):
    kind = {"scaled gradients": "gradient spike", "NaN gradient": "non-finite gradient"}[case]
    one, other = (rank[case] for rank in of_both)
    assert one["incidents"] == [(1, kind, 30, 1, AGAIN, "recovered")]
    same_on_both_ranks(one, other)


def test_monitor_alone_sees_the_same_on_all_ranks_and_changes_nothing(ddp):
    """K3: replicas that differ stay an incident without a rollback, and no rank waits."""
    one, other = (rank["observed"] for rank in ddp[1])
    assert (
        one["incidents"]
        == other["incidents"]
        == [(1, "non-finite weight", 30, 20, [], "unresolved")]
    )
    assert one["step"] == other["step"] == 50


def test_disagreement_at_the_last_step_lets_no_rank_end_before_the_others(ddp):
    one, other = (rank["last step"] for rank in ddp[1])
    assert one["incidents"] == [(1, APART, 49, 1, BACK, "handled")]
    assert one["step"] == 50
    same_on_both_ranks(one, other)


def test_rank_with_another_learning_rate_stops_the_run_with_that_reason(both):
    """Invariant 4: if no rollback helps, all ranks stop together."""
    one, other = (rank["learning rate"] for rank in both[1])
    assert one == other
    assert "the ranks' learning rates differ, by rank: " in one["stopped"]
    assert one["incidents"][0][1:4:2] == (APART, 9)


@pytest.mark.parametrize(
    ("case", "step", "kind", "responses"),
    [
        ("accumulation", 12, "non-finite loss", AGAIN),
        ("fp16", 30, "non-finite loss", AGAIN),
        ("two optimizers", 60, "gradient spike", AGAIN),
    ],
)
def test_windows_scalers_and_manual_optimization_decide_together_too(
    case, step, kind, responses, ddp
):
    one, other = (rank[case] for rank in ddp[1])
    (incident,) = one["incidents"]
    assert incident[1:3] == (kind, step)
    assert set(incident[4]) == set(responses)
    same_on_both_ranks(one, other)


def test_validation_before_and_between_steps_leaves_shards_where_they_were(fsdp2):
    one, other = (rank["validation"] for rank in fsdp2[1])
    same_on_both_ranks(one, other)
    assert one["incidents"] == []
    assert len(one["stats"][0].names) == 6


def test_incident_folder_under_ddp_is_saved_by_each_rank_separately(ddp):
    """Rank 0 has the whole state, every rank its own batch; the record is rank 0's."""
    folder = ddp[0] / "NaN-batch"
    first, second = sorted((folder / "incidents").iterdir())
    assert (first.name, second.name) == ("00000030-1", "00000030-1-rank1")
    checkpoint = torch.load(first / "checkpoint.ckpt", weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(
        checkpoint
    )
    assert not (second / "checkpoint.ckpt").exists()
    good, bad = (torch.load(f / "scene.pt", weights_only=False)["batch"] for f in (first, second))
    assert torch.isfinite(good[0]).all()
    assert torch.isnan(bad[0]).all()
    lines = [json.loads(x) for x in (folder / "incidents.jsonl").read_text().splitlines()]
    assert [x["event"] for x in lines] == ["open", "close"]


def test_incident_checkpoint_under_fsdp2_has_the_shards_of_all_ranks(fsdp2):
    first, second = sorted((fsdp2[0] / "NaN-loss" / "incidents").iterdir())
    assert {".metadata", "__0_0.distcp", "__1_0.distcp"} <= {
        p.name for p in (first / "checkpoint.ckpt").iterdir()
    }
    assert (second / "scene.pt").exists()


def test_checkpoints_around_a_disagreement_are_finite(ddp):
    saved = sorted((ddp[0] / "checkpoints" / "saved").glob("*.ckpt"))
    assert len(saved) >= 50
    for path in saved:
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.isfinite(v).all() for v in state.values()), path


class Own(DDPStrategy):
    """A strategy of the user's."""


def observed(root, make, allowed):
    """What the suite sees in a fit under a strategy that was never tried, with what is advised."""
    warnings.simplefilter("ignore")
    allow = (make().__class__.__name__,) if allowed else ()
    monitor = GradientMonitor(allow_strategies=allow)
    suite = [monitor, *stability_callbacks()[1:]] if allowed else [monitor]
    recorder = Recorder()
    fault = FaultInjector([NanLoss(step=30, rank=1)])
    net, trainer = fit_rank(root, make, [fault, *suite, recorder])
    return {
        "incidents": incidents_of([monitor]),
        "weights": whole(net.parameters()),
        "norms": [s.grad_norm for s in recorder.stats],
        "step": trainer.global_step,
    }


UNTRIED = {
    "FSDP1 on the host": (
        lambda: FSDPStrategy(cpu_offload=True),
        "FSDPStrategy: FSDP1 with cpu_off",
    ),
    "model averaging": (lambda: DDPStrategy(model_averaging_period=4), "with model averaging"),
    "the user's": (Own, "Own: this strategy was never tested with the suite"),
}


@pytest.mark.parametrize("callback", [AutoRollback, AnomalyCheckpoint, PrecisionFallback])
@pytest.mark.parametrize("name", UNTRIED)
def test_strategy_never_run_is_refused_unless_it_is_allowed_by_name(name, callback, tmp_path):
    """K3: with the reason, and the line to write."""
    make, message = UNTRIED[name]
    trainer = make_trainer(tmp_path, [GradientMonitor(), callback()], devices=2, strategy="ddp")
    # Lightning itself forbids FSDP1 on a CPU.
    trainer._accelerator_connector.strategy = make()
    with pytest.raises(RuntimeError, match=f"{callback.__name__} does not support .*{message}"):
        trainer.callbacks[1].setup(trainer, Regression(), "fit")
    kind = type(trainer.strategy).__name__
    trainer.callbacks[0].allow_strategies = (kind,)
    trainer.callbacks[1].setup(trainer, Regression(), "fit")


@pytest.mark.parametrize("allowed", [False, True], ids=["monitor", "allowed"])
def test_advice_of_a_refusal_works(allowed, tmp_path):
    """Only GradientMonitor, which changes nothing; or the strategy, allowed by its name."""
    one, other = run_ranks(observed, tmp_path, Own, allowed, folder=tmp_path)
    assert one["step"] == other["step"] == 50
    assert one["norms"] if allowed else other["norms"]
    finite = [bool(torch.isfinite(rank["weights"]).all()) for rank in (one, other)]
    assert finite == ([True, True] if allowed else [False, False])
    outcome = "recovered" if allowed else "unresolved"
    assert {i[-1] for rank in (one, other) for i in rank["incidents"]} == {outcome}


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", lambda: ModelParallelStrategy(2, 1)])
def test_strategy_that_was_run_is_accepted(strategy, tmp_path):
    strategy = strategy if isinstance(strategy, str) else strategy()
    callbacks = [GradientMonitor(), AnomalyCheckpoint(), PrecisionFallback(), AutoRollback()]
    trainer = make_trainer(tmp_path, callbacks, devices=2, strategy=strategy)
    for callback in trainer.callbacks[1:4]:
        callback.setup(trainer, Regression(), "fit")
    assert sharing(trainer) == ("shards" if isinstance(strategy, Strategy) else "replicas")


@pytest.mark.parametrize("case", [c for c in THREE if not c.endswith((" 0", " 1", "clean"))])
def test_three_ranks_recover_exactly_from_a_fault_after_the_first_step(case, three):
    """DDP sums the gradients in another order from the second step on: no rollback crosses that."""
    _, ranks = three
    for rank in ranks:
        assert torch.equal(rank[case]["weights"], rank["clean"]["weights"])
        assert [i[-1] for i in rank[case]["incidents"]] == ["recovered"]


@pytest.mark.parametrize("case", ["NaN loss, step 0", "NaN weight, step 1"])
def test_three_ranks_log_that_the_first_step_is_not_repeated_exactly(case, three):
    _, ranks = three
    said = [sum("the last bits may differ" in line for line in rank[case]["log"]) for rank in ranks]
    assert said == [1, 0, 0]
    assert all(torch.equal(rank[case]["weights"], ranks[0][case]["weights"]) for rank in ranks)
    # Not the weights: a bias before a normalization layer has gradients of rounding errors alone.
    last, clean = (ranks[0][each]["stats"][-1] for each in (case, "clean"))
    assert (last.step, last.loss) == (clean.step, pytest.approx(clean.loss, rel=1e-4))
