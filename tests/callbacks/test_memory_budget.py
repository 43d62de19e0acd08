"""A bound on the memory of snapshots, batches and the copies for an incident."""

import json
import logging

import pytest
import torch

from lit_stability import AutoRollback, GradientMonitor, read_incidents, stability_callbacks
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from lit_stability.trainer_internals import TrainingSnapshot
from tests.conftest import Regression, fit, lines_of, regression_data
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net

MIB = 2**20


class Wide(Regression):
    """A net of 1.25 MiB of weights, 3.75 MiB with its moments, on rows of 64 KiB."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2**14, 20)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.losses.append(float(loss.detach()))
        return loss


def wide_data():
    """60 batches of 256 KiB."""
    return torch.utils.data.DataLoader(torch.randn(240, 2**14), 4)


def record_of(root, budget, **options):
    """What the record of an incident at step 50 holds of the memory."""
    rollback = AutoRollback(memory_budget=budget, **options)
    callbacks = [FaultInjector([NanLoss(step=50)]), GradientMonitor(), rollback]
    fit(root, callbacks, module=Wide, data=wide_data())
    return read_incidents(root)[0]["memory"]


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("budget", "snapshots"),
    [
        (None, 2),
        ("20 MiB", 2),
        ("12 MiB", 1),
        ("5 MiB", 1),
        ("3 MiB", 0),
        ("1 MiB", 0),
    ],
)
@pytest.mark.parametrize("where", ["auto", "device", "host"])
def test_budget_bounds_what_is_held_in_a_fit(budget, snapshots, where, tmp_path):
    """One snapshot takes 3.75 MiB, 40 batches take 10 MiB: all takes 17.5 MiB."""
    memory = record_of(tmp_path, budget, snapshot_device=where)
    assert memory["snapshots"] == len(memory["places"]) == snapshots
    held = memory["snapshots"] * memory["snapshot_bytes"] + memory["batch_bytes"]
    if budget is None:
        assert memory["max_batch_bytes"] == 2**30
        assert held > 15 * MIB
    else:
        limit = int(budget.split()[0]) * MIB
        assert memory["memory_budget"] == limit
        room = snapshots * memory["snapshot_bytes"] + memory["max_batch_bytes"]
        assert held <= limit
        assert room + memory["incident_bytes"] <= limit or not snapshots
    assert bool(memory["lost"]) == (snapshots < 2)


@pytest.mark.parametrize("budget", ["20 MiB", "12 MiB", "5 MiB", "3 MiB"])
def test_no_more_is_held_at_any_step_than_the_budget_allows(budget, tmp_path, monkeypatch):
    """Counted from outside: all snapshots that exist, and all batches that the ring holds."""
    made, most = [], []
    build = TrainingSnapshot.__init__

    def counted(self, *args):
        build(self, *args)
        made.append(self)

    monkeypatch.setattr(TrainingSnapshot, "__init__", counted)

    class Counter(GradientMonitor):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            engine = trainer.callbacks[-1]._executor._engine
            kept = {id(s) for s in engine._store.rotation.all}
            held = sum(s.nbytes for s in made if id(s) in kept)
            most.append(held + engine._ring.nbytes)

    fit(tmp_path, [Counter(), AutoRollback(memory_budget=budget)], module=Wide, data=wide_data())
    # The newest batch is held in any case, by the loop too.
    assert max(most) <= int(budget.split()[0]) * MIB + 2**18


def test_batches_beyond_the_budget_are_not_replayed_and_the_log_names_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    callbacks = [FaultInjector([CorruptWeight(step=50)]), GradientMonitor()]
    fit(
        tmp_path,
        [*callbacks, AutoRollback(memory_budget="5 MiB")],
        module=Wide,
        data=wide_data(),
    )
    assert "; the batches are more: they are not replayed after a rollback" in caplog.text
    assert "that memory_budget=5242880 leaves: they are skipped, not replayed" in caplog.text
    assert callbacks[1].incidents[0].responses[0] == "rolled back"


def test_decision_is_one_line_with_bytes_bound_and_what_is_lost(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(
        tmp_path,
        [GradientMonitor(), AutoRollback(memory_budget="12 MiB")],
        module=Wide,
        data=wide_data(),
    )
    first, *lines = lines_of(caplog)
    assert "; two snapshots, 1.3 MiB each and the optimizer state, one every " in first
    assert lines == [
        "AutoRollback keeps one snapshot on the device, as two do not fit into "
        "memory_budget=12.0 MiB beside 10.0 MiB of batches and other copies, 3.8 MiB each; "
        "0 batches to replay, 0.0 KiB of at most 8.2 MiB; damage that is found only after the "
        "next one was taken cannot be undone"
    ]


def test_copies_for_an_incident_count_where_a_callback_runs_the_step_again(tmp_path):
    suite = stability_callbacks()
    suite[-1] = AutoRollback(memory_budget="18 MiB")
    fit(tmp_path, [FaultInjector([NanLoss(step=50)]), *suite], module=Wide, data=wide_data())
    memory = read_incidents(tmp_path)[0]["memory"]
    assert memory["incident_bytes"] > MIB
    assert memory["snapshots"] == 1, "without them, 18 MiB are enough for two"


def test_run_within_a_small_budget_is_unchanged(tmp_path):
    bare = run(tmp_path / "bare", Net, loader(Batches()), max_epochs=3)
    suite = stability_callbacks()
    suite[-1] = AutoRollback(memory_budget="10 KiB")
    within = run(tmp_path / "within", Net, loader(Batches()), suite, max_epochs=3)
    assert differences(bare, within) == {}


@pytest.mark.parametrize("budget", ["70 KiB", "40 KiB"])
def test_rollback_within_a_budget_is_exact(budget, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clean = run(tmp_path / "clean", Net, loader(Batches()), max_epochs=3)
    callbacks = [
        FaultInjector([CorruptWeight(step=45, parameter="first.0.weight")]),
        GradientMonitor(),
        AutoRollback(memory_budget=budget),
    ]
    saved = run(tmp_path / "saved", Net, loader(Batches()), callbacks, max_epochs=3)
    assert callbacks[1].incidents[0].responses == ["rolled back and replayed"], caplog.text
    assert differences(clean, saved) == {}


@pytest.mark.parametrize("value", ["4 gigs", 0, -1, True, 1.5])
def test_bad_budget_is_refused_with_the_value(value):
    with pytest.raises(ValueError, match="memory_budget must be bytes") as error:
        AutoRollback(memory_budget=value)
    assert repr(value) in str(error.value)


def test_record_of_an_incident_holds_the_decision_as_plain_json(tmp_path):
    memory = record_of(tmp_path, "12 MiB")
    assert memory == json.loads(json.dumps(memory))
    assert memory["reason"].startswith("two do not fit into memory_budget=12.0 MiB")
    assert memory["lost"].startswith("damage that is found only after the next one was taken")


def test_incident_without_a_rollback_records_no_memory(tmp_path):
    monitor = GradientMonitor()
    fit(tmp_path, [FaultInjector([NanLoss(step=50)]), monitor], data=regression_data())
    assert read_incidents(tmp_path)[0]["memory"] == {}
