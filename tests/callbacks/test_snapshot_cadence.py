"""How often snapshots are taken: on a clock of the test, so that each run is the same."""

import json
import logging
import os

import pytest
from lightning.pytorch import Callback

from lit_stability import AutoRollback, GradientMonitor, stability_callbacks
from lit_stability.callbacks.auto_rollback import snapshot_timer
from lit_stability.faults import CorruptMoment, CorruptWeight, FaultInjector, NanLoss
from lit_stability.trainer_internals import TrainingSnapshot
from tests.conftest import fit, lines_of
from tests.distributed import run_ranks
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net
from tests.rank_cases import fit_rank

STEP = 0.01


class Clock(Callback):
    """Time that passes by 10 ms a step and by some for each capture."""

    def __init__(self, monkeypatch, capture):
        self.now, self.captured_at = 0.0, []
        original = TrainingSnapshot.capture

        def slow(snapshot, trainer, *args, **options):
            self.now += capture
            self.captured_at.append(trainer.global_step)
            original(snapshot, trainer, *args, **options)

        monkeypatch.setattr(TrainingSnapshot, "capture", slow)
        monkeypatch.setattr(snapshot_timer, "clock", lambda: self.now)

    def on_train_batch_end(self, *args):
        self.now += STEP


def captures_of(tmp_path, monkeypatch, capture, steps=110, **options):
    """The steps at which a fit takes snapshots that take so many seconds."""
    clock = Clock(monkeypatch, capture)
    options = {"snapshot_every": 10, "confirm_after": 3, "snapshot_cost": 0.05, **options}
    fit(tmp_path, [GradientMonitor(), AutoRollback(**options), clock], max_steps=steps)
    return clock.captured_at


@pytest.mark.parametrize(
    ("capture", "expected"),
    [
        (0.004, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (0.015, [0, 10, 20, 30, 40, 50, 90]),
    ],
)
def test_snapshots_that_cost_too_much_are_taken_less_often(
    capture, expected, tmp_path, monkeypatch
):
    """5 % of a step of 10 ms are 0.5 ms: 4 ms every 10 steps are less, 15 ms take 40 steps."""
    assert captures_of(tmp_path, monkeypatch, capture) == expected


def test_snapshots_at_a_fixed_distance_may_cost_anything(tmp_path, monkeypatch):
    found = captures_of(tmp_path, monkeypatch, 5.0, snapshot_cost=None)
    assert found == [*range(0, 110, 10)]


def test_distance_leaves_room_for_the_batches_to_replay(tmp_path, monkeypatch):
    """A batch takes 640 bytes; two distances of 20 steps and three more of them fit."""
    found = captures_of(tmp_path, monkeypatch, 0.015, max_replay_bytes=640 * 50)
    assert found == [0, 10, 20, 30, 40, 50, 70, 90]


def test_distance_is_stated_before_the_first_step_and_when_it_changes(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    captures_of(tmp_path, monkeypatch, 0.015)
    first, *lines = lines_of(caplog)
    assert ", one every 10 to 160 steps" in first
    assert lines == [
        "AutoRollback takes a snapshot every 40 steps from now on: one takes 15 ms, a step 10 ms, "
        "and snapshot_cost=0.05",
    ]


def test_distance_is_in_the_record_of_an_incident(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, 0.015)
    suite = [GradientMonitor(), AutoRollback(snapshot_every=10, snapshot_cost=0.05)]
    fit(tmp_path, [FaultInjector([NanLoss(step=80)]), *suite, clock], max_steps=85)
    (file,) = tmp_path.rglob("incidents.jsonl")
    record = json.loads(file.read_text().splitlines()[0])
    assert record["cadence"] == {
        "snapshot_every": 40,
        "capture_seconds": pytest.approx(0.015),
        "step_seconds": pytest.approx(STEP),
    }


def on_one_rank(folder):
    """The steps of the snapshots of a rank; on rank 1 they take long."""
    rank = int(os.environ["LOCAL_RANK"])
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch, capture=[0.001, 0.015][rank])
        rollback = AutoRollback(snapshot_every=10, confirm_after=3, snapshot_cost=0.05)
        fit_rank(folder, "ddp", [GradientMonitor(), rollback, clock], max_steps=100)
    return clock.captured_at


def test_ranks_take_their_snapshots_at_the_same_steps(tmp_path):
    one, other = run_ranks(on_one_rank, tmp_path, folder=tmp_path)
    assert one == other == [0, 10, 20, 30, 40, 50, 90]


FAULTS = {"weight": CorruptWeight, "moment": CorruptMoment, "loss": NanLoss}


@pytest.mark.each_value
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [52, 71, 100, 185])
def test_recovery_is_exact_at_any_distance(fault, step, tmp_path, monkeypatch):
    clean = run(tmp_path / "clean", Net, loader(Batches()), max_epochs=9)
    clock = Clock(monkeypatch, 0.015)
    suite = [GradientMonitor(), AutoRollback(snapshot_every=10, snapshot_cost=0.05)]
    callbacks = [FaultInjector([FAULTS[fault](step=step)]), *suite, clock]
    saved = run(tmp_path / "saved", Net, loader(Batches()), callbacks, max_epochs=9)
    assert suite[0].incidents, "the fault was seen"
    assert len(clock.captured_at) < 16, "snapshots have become rarer"
    assert differences(clean, saved) == {}


def test_healthy_run_is_unchanged_by_a_distance_that_changes(tmp_path, monkeypatch):
    bare = run(tmp_path / "bare", Net, loader(Batches()), max_epochs=9)
    clock = Clock(monkeypatch, 1.0)
    suite = run(
        tmp_path / "suite", Net, loader(Batches()), [*stability_callbacks(), clock], max_epochs=9
    )
    assert len(clock.captured_at) < 216 / 20
    assert differences(bare, suite) == {}


@pytest.mark.parametrize("value", [0, 1, -0.1, 2.0, float("nan")])
def test_number_that_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=r"snapshot_cost must be a share .* got"):
        AutoRollback(snapshot_cost=value)
