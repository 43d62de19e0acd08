"""Clipping by a rule beside a rollback, a restart, other precisions and other ranks."""

import functools
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_stability import (
    AdaptiveGradientClipping,
    AutoRollback,
    CrashPrediction,
    GradientMonitor,
    PrecisionFallback,
    read_incidents,
)
from lit_stability.faults import (
    CorruptWeight,
    FaultInjector,
    NanLoss,
    ScaleGradients,
    ScaleLoss,
)
from lit_stability.policies.clip_rules import FixedClip, TieredClip
from tests.clip_cases import BUSY, RULE, Norms, clipped_fits, expected, suite
from tests.conftest import fit
from tests.distributed import run_ranks_once
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net
from tests.test_exact_recovery import TwoOptimizers as ExactTwoOptimizers
from tests.test_invariants import fp16_on_cpu


@pytest.mark.parametrize("order", ["clipping first", "rollback first"])
@pytest.mark.parametrize("norm", [0.2, 1.0, 5.0])
def test_clip_that_a_rollback_tightened_holds_too_and_the_smaller_wins(norm, order, tmp_path):
    """K3: never the product of both coefficients."""

    class Tighten(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rollback.backoff.clip_factor = 0.25 if trainer.global_step >= 20 else 1.0
            self.threshold = rollback._executor.baselines[0].clip_threshold(0.25)
            seen.append(self.threshold)

    seen, norms, rollback = [], Norms(), AutoRollback(relax_after=1000)
    both = [AdaptiveGradientClipping(rule=FixedClip(norm=norm)), rollback]
    both = both if order == "clipping first" else both[::-1]
    fit(tmp_path, [Tighten(), GradientMonitor(), *both, norms], max_steps=40)
    for step in range(40):
        largest = min(norm, seen[step]) if step >= 20 else norm
        assert norms.clipped[step] == pytest.approx(min(norms.measured[step], largest), rel=1e-5)


@pytest.mark.parametrize("norm", [0.05, 5.0])
def test_clip_of_a_step_that_changes_the_regime_is_the_smaller_too(norm, tmp_path):
    """The monitor replaces the measurement of that step between the two callbacks."""
    prediction, norms, accepted, thresholds = CrashPrediction(), Norms(), [], {}

    class Tighten(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            prediction.prevention.clip_factor = 0.25

        def on_regime_change(self, trainer, pl_module, stats):
            accepted.append(len(norms.measured) - 1)

        def on_step_measured(self, trainer, pl_module, stats):
            baseline = prediction._baselines[0]
            thresholds[len(norms.measured)] = baseline.clip_threshold(0.25)

    louder = FaultInjector([ScaleLoss(step=30, steps=1000, factor=200.0)])
    clipping = AdaptiveGradientClipping(rule=FixedClip(norm=norm))
    suite = [GradientMonitor(), prediction, clipping, AutoRollback()]
    fit(tmp_path, [louder, Tighten(), *suite, norms], max_steps=80, max_epochs=-1)
    (index,) = accepted
    smallest = min(norm, thresholds[index])
    assert norms.measured[index] > smallest
    assert norms.clipped[index] == pytest.approx(smallest, rel=1e-5)


def test_learning_rate_cuts_of_both_multiply_and_neither_undoes_the_other(tmp_path):
    """K3, N2."""
    rollback, norms = AutoRollback(relax_after=12), Norms()
    rule = TieredClip(tiers=((30.0, 5.0, 0.5),), otherwise=20.0, lr_steps=8)

    class Cut(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 16 and not rollback.backoff.active:
                rollback.backoff.cut(0.5, 1.0)
                rollback._executor.apply_learning_rates()

    faults = FaultInjector([ScaleGradients(step=20, factor=10.0)])
    fit(tmp_path, [faults, Cut(), *suite(rule, rollback, norms)], max_steps=40)
    assert norms.factors == [1.0] * 16 + [0.5] * 4 + [0.25] * 7 + [0.5] * 1 + [1.0] * 12


EXACT = {
    "spike": ({}, [functools.partial(ScaleLoss, step=35)], ()),
    "bad batch": ({}, [], (10,)),
    "NaN weight": ({}, [functools.partial(CorruptWeight, step=35)], ()),
    "two optimizers": ({"module": ExactTwoOptimizers}, [], (10,)),
    "accumulation": ({"accumulate_grad_batches": 4}, [], (3,)),
    "fp16": ({"plugins": fp16_on_cpu}, [], (10,)),
}


@pytest.mark.parametrize(
    ("case", "rule"),
    [*((case, "tiered") for case in EXACT), ("spike", "percentile"), ("NaN weight", "z-score")],
)
def test_recovered_run_that_clips_equals_one_that_never_met_the_fault(case, rule, tmp_path):
    """S12, invariants 3 and 7: weights, and what the rule has learnt."""
    options, faults, bad = EXACT[case]
    options = {"max_epochs": 2, "module": Net, **options}
    results, states = [], []
    for folder in ("faulty", "clean"):
        faulty = folder == "faulty"
        callbacks = suite(BUSY[rule], *([AutoRollback()] if faulty else []))
        states.append(callbacks[1])
        if faulty and faults:
            callbacks = [FaultInjector([make_fault() for make_fault in faults]), *callbacks]
        data = loader(Batches(nan=bad) if faulty else Batches(left_out=bad))
        now = {k: v() if k == "plugins" else v for k, v in options.items()}
        results.append(run(tmp_path / folder, data=data, callbacks=callbacks, **now))
    assert differences(*results) == {}
    assert states[0].state_dict() == states[1].state_dict()
    assert read_incidents(tmp_path / "faulty")


def test_skipped_step_is_retried_without_restoring_a_snapshot(tmp_path):
    """The smallest remedy: a rule that never learns from a skipped step has nothing to restore."""
    norms = Norms()
    faults = FaultInjector([NanLoss(step=35)])
    fit(
        tmp_path, [faults, GradientMonitor(), *suite(BUSY["percentile"])[1:], AutoRollback(), norms]
    )
    assert norms.batches == 61, "60 steps, and one of them twice"


class Still(Net):
    """Without dropout: Lightning's own checkpoints do not bring the generators back."""

    def __init__(self):
        super().__init__()
        self.last[0].p = 0.0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", ["tiered", "percentile", "mean and sigma", "z-score"])
def test_run_resumed_from_a_checkpoint_clips_on_as_if_it_had_not_ended(name, tmp_path):
    """S11, S12: thresholds, and a cut of the learning rate that is in force."""
    cut = TieredClip(tiers=((8.0, 1.0, 0.5),), lr_steps=50)  # by the first step, and by no other
    rule = cut if name == "tiered" else BUSY[name]
    first, second, whole = (suite(rule) for _ in range(3))
    saved = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
    data = functools.partial(loader, Batches())
    options = {"max_epochs": 1, "enable_checkpointing": True}
    run(tmp_path / "a", Still, data, [*first, saved], **options)
    file = tmp_path / "c" / "epoch=0.ckpt"
    assert torch.load(file, weights_only=True)["callbacks"][first[1].state_key]
    resumed = run(tmp_path / "b", Still, data, second, max_epochs=2, resume=file)
    clean = run(tmp_path / "clean", Still, data, whole, max_epochs=2)
    assert not {"weights", "optimizers", "global_step"} & set(differences(resumed, clean))
    assert second[1].state_dict() == whole[1].state_dict() != first[1].state_dict()


def test_precision_fallback_keeps_what_was_learnt(tmp_path):
    callbacks = suite(BUSY["percentile"], PrecisionFallback(), AutoRollback())
    fit(tmp_path, callbacks, max_steps=40, precision="bf16-mixed")
    assert len(callbacks[1].state_dict()["0"]["state"]["norms"]) == 20


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks_once(tmp_path_factory, clipped_fits, "clipping")[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_clip_the_norm_of_all_to_the_same(strategy, ranks):
    """Invariant 5: under FSDP2 a rank's own shards have a smaller norm."""
    one, other = (rank[strategy, "clean"] for rank in ranks)
    assert torch.equal(one["weights"], other["weights"])
    assert one["state"] == other["state"]
    assert one["clipped"] == pytest.approx(expected(RULE, one["measured"]), rel=1e-4)
    assert min(one["clipped"]) < 0.5 * max(one["measured"])


def test_ranks_limit_each_tensor_by_its_norm_on_all_of_them(ranks):
    """Under FSDP2 each has a part of the tensor, and one has no part of the smallest."""
    one, other = (rank["fsdp2", "per tensor"] for rank in ranks)
    assert torch.equal(one["weights"], other["weights"])
    assert one["state"] == other["state"]
    averages = list(one["state"]["0"]["state"]["norms"].values())
    limit = 1.05 * 1.001**30 * math.hypot(*averages)
    assert max(one["clipped"][:5]) == pytest.approx(0.5, rel=1e-4)
    assert max(one["clipped"][5:]) <= limit < 0.7 * max(one["measured"][5:])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_that_roll_back_take_back_what_was_learnt(strategy, ranks):
    """Invariants 5 and 7."""
    for rank in ranks:
        clean, back = rank[strategy, "clean"], rank[strategy, "rolled back"]
        assert back["incidents"] == 1
        assert torch.equal(clean["weights"], back["weights"])
        assert clean["state"] == back["state"]
