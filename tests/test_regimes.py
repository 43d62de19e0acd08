"""A run whose loss, data or modules change on purpose is not stopped for it."""

import json
import logging
from pathlib import Path

import pytest
import torch

from benchmarks.changes import AT, Staged, batches
from lit_stability import GradientMonitor, stability_callbacks
from lit_stability.callbacks.auto_rollback import AutoRollback
from lit_stability.detectors import DetectorSet, Divergence, Spike, flagged
from lit_stability.faults import FaultInjector, ScaleLoss
from lit_stability.incidents.report import responses_text
from lit_stability.measurement.step_stats import StepStats
from tests.conftest import fit, skipping_suite
from tests.distributed import run_ranks
from tests.regime_rank_cases import changed


def staged(tmp_path, change, callbacks, optimizer="adamw", **options):
    """The module after a fit of 240 steps."""
    options = {"data": batches(400), "max_steps": 240, "max_epochs": -1, **options}
    return fit(tmp_path, callbacks, lambda: Staged(change, optimizer), **options)[0]


CHANGES = [
    *((change, "adamw") for change in ("30 loss", "100 loss", "100 second head", "10 inputs")),
    *((change, "sgd") for change in ("10 loss", "100 loss", "100 second head", "30 inputs")),
]


@pytest.mark.each_value
@pytest.mark.parametrize(("change", "optimizer"), CHANGES)
def test_change_that_stays_is_accepted_and_the_run_goes_on(change, optimizer, tmp_path, caplog):
    """Invariant 3: rejections of finite values end in a new window, and this is logged."""
    suite = stability_callbacks()
    with caplog.at_level(logging.INFO, "lightning.pytorch.lit_stability"):
        module = staged(tmp_path, change, suite, optimizer)
    assert module.trainer.global_step == 240
    (incident,) = suite[0].incidents
    assert incident.outcome == "recovered"
    assert incident.occurrences <= 31
    assert incident.cause == "change of regime"
    assert "accepted as the new normal" in responses_text(incident)
    assert "what changes at this step" in incident.remedy
    assert "accepts the recent values as the new normal" in caplog.text
    rollback = next(c for c in suite if isinstance(c, AutoRollback))
    assert (rollback.backoff.lr_factor, rollback.backoff.clip_factor) == (1.0, 1.0)
    assert rollback.escalation.left["rollbacks"] >= 6  # of 8
    # It learns as the run without the suite does: most of what the change has brought is gone.
    bare = staged(tmp_path / "bare", change, [], optimizer)
    before, after = (sum(m.losses[-40:]) / 40 for m in (bare, module))
    assert after < 1.3 * before


WAYS = {
    "data are skipped": (skipping_suite, {}),
    "accumulated": (stability_callbacks, {"accumulate_grad_batches": 2}),
    "bf16": (stability_callbacks, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_change_is_accepted_in_other_ways_of_training_too(way, tmp_path):
    make, options = WAYS[way]
    suite = make()
    module = staged(tmp_path, "100 loss", suite, **options)
    assert module.trainer.global_step == 240
    assert [i.cause for i in suite[0].incidents] == ["change of regime"]
    assert suite[-1].backoff.lr_factor == 1.0


def test_change_is_recorded_with_its_cause(tmp_path):
    suite = stability_callbacks()
    staged(tmp_path, "100 loss", suite)
    lines = Path(suite[0].incidents[0].record).read_text(encoding="utf8").splitlines()
    closed = json.loads(lines[-1])
    assert closed["cause"] == "change of regime"
    assert any("it stays" in sentence for sentence in closed["evidence"])


def test_monitor_alone_reports_a_change_and_changes_nothing(tmp_path):
    monitor = GradientMonitor()
    module = staged(tmp_path, "100 loss", [monitor])
    (incident,) = monitor.incidents
    assert (incident.outcome, responses_text(incident)) == ("observed", "")
    assert incident.cause == "change of regime"
    assert module.losses == staged(tmp_path / "bare", "100 loss", []).losses


def test_faults_after_a_change_are_judged_by_what_is_normal_now(tmp_path):
    """The window is a new one: what was a spike is none, and what is one is found again."""
    suite = stability_callbacks()
    injector = FaultInjector([ScaleLoss(step=200, factor=1e4)])
    staged(tmp_path, "100 loss", [injector, *suite])
    kinds = [(i.first.kind, i.first.step, i.outcome) for i in suite[0].incidents]
    assert kinds == [
        ("gradient spike", AT, "recovered"),
        ("gradient spike", 200, "recovered"),
    ]


def step(i, loss=1.0, norm=1.0, rate=1.0):
    return StepStats(step=i, loss=loss, grad_norm=norm, learning_rates=(rate,))


def attempts(detector, rates):
    """Returns the rejected steps, one attempt for each learning rate; repeats start at step 30."""
    objections = []
    for attempt, rate in enumerate(rates):
        for i in range(30 if attempt else 0, 60):
            high = 100.0 if i >= 40 else 1.0
            if flagged(detector, step(i, high, high, rate)):
                objections.append(i)
                break
    return objections


@pytest.mark.parametrize(
    ("detector", "first"),
    [(Spike(accept_after=3), 40), (Divergence(persist=5, accept_after=3), 44)],
)
def test_replayed_steps_do_not_reset_a_rejection_streak(detector, first):
    """Steps replayed from step 30 on were accepted before; they are no evidence on step 40."""
    assert attempts(detector, [1.0, 0.5, 0.25, 0.125]) == [first] * 3
    assert detector.regimes == 1


def test_loss_that_recurs_without_a_change_is_no_new_evidence():
    """Steps replayed unchanged, or without a batch: no lower learning rate was tried yet."""
    detector = Divergence(persist=5, accept_after=2)
    assert attempts(detector, [1.0, 1.0, 1.0, 1.0, 0.5]) == [44] * 5
    assert detector.regimes == 0
    assert attempts(detector, [0.5, 0.25]) == [44]
    assert detector.regimes == 1


@pytest.mark.parametrize("detector", [Spike(accept_after=3), Divergence(persist=5, accept_after=3)])
def test_trouble_that_comes_at_another_step_each_time_is_never_accepted(detector):
    """As it does where a lower learning rate puts it off, or the snapshot is another."""
    for onset in (40, 43, 39, 47, 45, 44, 50):
        for i in range(30 if onset != 40 else 0, 60):
            high = 100.0 if i >= onset else 1.0
            if flagged(detector, step(i, high, high)):
                break
        else:
            pytest.fail(f"nothing was found from step {onset} on")
    assert detector.regimes == 0


def test_one_accepted_regime_resets_all_detectors_of_its_optimizer():
    messages = []
    detectors = DetectorSet([Spike(accept_after=3), Divergence()], [0, 1], messages.append)
    for i in range(40):
        for optimizer in (0, 1):
            stats = StepStats(step=i, loss=1.0, grad_norm=1.0, optimizer=optimizer)
            assert detectors.verdict(stats, voting=False) == (None, True)
            detectors.learn(stats)
    found = []
    for _ in range(4):
        found.append(detectors.verdict(step(40, loss=9.0, norm=100.0), voting=False)[0] is None)
        assert (detectors.regime_change is not None) is found[-1]
    assert found == [False, False, False, True]
    windows = {
        i: [state["window"] for _, state in each] for i, each in detectors.state_dict().items()
    }
    assert windows["0"] == [[], []]
    assert all(len(window) == 40 for window in windows["1"])
    assert len(messages) == 1


def test_ranks_accept_a_change_together(tmp_path):
    """Invariant 5: the rejection streak is the same on every rank, as its numbers are."""
    first, second = run_ranks(changed, tmp_path, folder=tmp_path)
    for name in ("ddp", "fsdp2"):
        assert first[name]["incidents"] == second[name]["incidents"]
        (incident,) = first[name]["incidents"]
        assert "accepted as the new normal" in str(incident)
        assert torch.equal(first[name]["weights"], second[name]["weights"])
        assert first[name]["steps"] == second[name]["steps"]
