"""The attempts of real fits, read back from their event files."""

import contextlib
import dataclasses
import json
import warnings

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from lit_stability import (
    AdaptiveGradientClipping,
    Anomaly,
    AnomalyCheckpoint,
    GradientMonitor,
    StabilityCallback,
    TrainingStopped,
    read_incidents,
    stability_callbacks,
)
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from lit_stability.incidents.step_history import FIELDS
from lit_stability.policies.actions import SkipStep
from lit_stability.policies.clip_rules import TieredClip
from tests.callbacks.test_battery import TwoOptimizers
from tests.conftest import Regression, fit, flat, make_trainer, regression_data
from tests.distributed import run_ranks
from tests.rank_cases import fit_rank


def run(root, callbacks, module=None, **options):
    """A fit that logs to `root`, every step unless told otherwise."""
    logger = TensorBoardLogger(root, "", "")
    return fit(root, callbacks, module, logger=logger, **({"log_every_n_steps": 1} | options))


def read(root):
    accumulator = EventAccumulator(str(root), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def rows(root, optimizer=""):
    """The attempts of a run, as dicts."""
    events = read(root).Tensors(f"stability/steps{optimizer}")
    found = [tensor_util.make_ndarray(e.tensor_proto).tolist() for e in events]
    assert [e.step for e in events] == [row[0] for row in found]
    return [dict(zip(FIELDS, row, strict=True)) for row in found]


def incidents(root):
    """Each time an incident was written, as dicts."""
    found = read(root)
    tags = sorted(t for t in found.Tags()["tensors"] if t.startswith("stability/incident/"))
    return [json.loads(e.tensor_proto.string_val[0]) for t in tags for e in found.Tensors(t)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A weight is torn before step 45: vetoed, rolled back to step 20, replayed."""
    root = tmp_path_factory.mktemp("damaged")
    faults = FaultInjector([CorruptWeight(step=45, parameter="net.0.weight")])
    run(root, [faults, *stability_callbacks()], max_steps=100, data=regression_data(120))
    return root


def test_attempts_go_on_where_steps_go_back(damaged):
    """K5: nothing that happened is missing."""
    found = rows(damaged)
    assert [r["attempt"] for r in found] == list(range(1, len(found) + 1))
    assert [r["step"] for r in found] == [*range(46), *range(20, 100)]
    assert [r["attempt"] for r in found if not r["taken"]] == [46]


def test_incident_knows_the_attempts_that_were_taken_back(damaged):
    """S17."""
    opened, closed, last = incidents(damaged)
    assert (opened["attempt"], opened["closed_attempt"], opened["spans"]) == (46, None, [])
    assert (closed["closed_attempt"], closed["spans"]) == (82, [[21, 46]])
    assert closed["outcome"] == last["outcome"] == "recovered"
    window = [dict(zip(last["window"]["fields"], r, strict=True)) for r in last["window"]["rows"]]
    assert [r["attempt"] for r in window] == list(range(1, 103))
    assert window[45]["loss"] == "nan"


def test_step_taken_again_by_way_of_a_snapshot_is_a_rollback_too(tmp_path):
    """What somebody registered can be put back by a snapshot alone; no ``on_rollback`` tells."""
    suite = stability_callbacks()
    suite[-1].register(torch.nn.Linear(1, 1))
    run(tmp_path, [FaultInjector([NanLoss(step=33)]), *suite])
    again = rows(tmp_path)[34]["step"]
    assert again < 33
    assert incidents(tmp_path)[-1]["spans"] == [[again + 1, 34]]


def test_steps_between_the_loggers_are_written_only_if_something_happened(tmp_path):
    run(
        tmp_path,
        [FaultInjector([NanLoss(step=33)]), *stability_callbacks()],
        log_every_n_steps=10,
    )
    assert [r["attempt"] for r in rows(tmp_path)] == [10, 20, 30, 34, 40, 50, 60]
    window = incidents(tmp_path)[-1]["window"]["rows"]
    assert [r[0] for r in window] == list(range(1, 62)), "at full resolution all the same"


def test_incident_without_a_responder_is_written_as_a_step_that_was_taken(tmp_path):
    run(tmp_path, [FaultInjector([NanLoss(step=33)]), GradientMonitor()], log_every_n_steps=50)
    assert [(r["attempt"], r["taken"]) for r in rows(tmp_path)][:1] == [(34, 1.0)]


def test_fit_that_is_stopped_leaves_its_incident_with_the_end_of_it(tmp_path):
    faults = FaultInjector([NanLoss(step=20, steps=10_000)])
    with pytest.raises(TrainingStopped):
        run(tmp_path, [faults, *stability_callbacks()], data=regression_data(200))
    last = incidents(tmp_path)[-1]
    assert last["outcome"] == "stopped"
    assert last["closed_attempt"] == last["window"]["rows"][-1][0] == rows(tmp_path)[-1]["attempt"]


@pytest.mark.parametrize(
    ("callbacks", "options", "threshold"),
    [
        ([], {}, None),
        ([], {"gradient_clip_val": 0.5}, 0.5),
        ([], {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, None),
        ([AdaptiveGradientClipping(rule=TieredClip())], {"gradient_clip_val": 50.0}, "rule"),
    ],
    ids=["none", "Trainer", "by value", "the smaller of two"],
)
def test_clip_threshold_is_the_norm_that_was_clipped_to(tmp_path, callbacks, options, threshold):
    """N2, S14."""
    run(tmp_path, [GradientMonitor(), *callbacks], max_steps=12, **options)
    for row in rows(tmp_path):
        told = TieredClip().threshold(row["grad_norm"]) if threshold == "rule" else threshold
        assert row["clip_threshold"] == told or (told is None and row["clip_threshold"] != told)


def test_count_of_attempts_survives_a_restart_and_its_absence(tmp_path):
    """S12: a resumed job goes on counting; a checkpoint of an older version begins anew."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=40, filename="at", save_top_k=-1)
    faults = FaultInjector([NanLoss(step=10)])
    options = {"max_steps": 40, "enable_checkpointing": True}
    run(
        tmp_path / "first",
        [faults, *stability_callbacks(), saver],
        **options,
    )
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    state = saved["callbacks"]["GradientMonitor"]
    assert state["attempts"] == 41
    seed_everything(0, verbose=False)
    logger = TensorBoardLogger(tmp_path / "second", "", "")
    options = {"max_steps": 50, "log_every_n_steps": 1, "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, [*stability_callbacks(), saver], logger=logger, **options)
    trainer.fit(Regression(), regression_data(), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    found = rows(tmp_path / "second")
    assert [(r["attempt"], r["step"]) for r in found] == [(s + 2, s) for s in range(40, 50)]
    monitor = GradientMonitor()
    monitor.load_state_dict({k: v for k, v in state.items() if k != "attempts"})
    assert monitor.state_dict()["attempts"] == 0


def test_each_optimizer_has_its_own_rows_and_all_share_the_count(tmp_path):
    run(tmp_path, [GradientMonitor()], TwoOptimizers, max_steps=20)
    assert [r["attempt"] for r in rows(tmp_path)] == list(range(1, 20, 2))
    assert [r["attempt"] for r in rows(tmp_path, "_1")] == list(range(2, 21, 2))
    assert [{r["optimizer"] for r in rows(tmp_path, which)} for which in ("", "_1")] == [{0}, {1}]


def test_each_optimizer_has_update_ratios_where_both_scan_in_one_batch(tmp_path):
    run(tmp_path, [GradientMonitor(scan_weights_every=5)], TwoOptimizers, max_steps=40)
    tags = [tag for tag in read(tmp_path).Tags()["tensors"] if "/update_ratio/" in tag]
    assert sorted(tag.split("/")[1] for tag in tags) == ["layers", "layers_1"]


class Logged(Callback):
    """Every metric that the module's own logging has given to the loggers."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append({k: float(v) for k, v in trainer.logged_metrics.items()})


def test_healthy_run_that_writes_is_the_run_without_it(tmp_path):
    """Invariant 1."""
    told = {}
    for name, suite in (("bare", []), ("suite", stability_callbacks())):
        logged = Logged()
        module, trainer = run(tmp_path / name, [*suite, logged])
        told[name] = (flat(module), trainer.global_step, torch.get_rng_state(), logged.seen)
    assert torch.equal(told["bare"][0], told["suite"][0])
    assert torch.equal(told["bare"][2], told["suite"][2])
    assert told["bare"][1::2] == told["suite"][1::2]
    assert len(rows(tmp_path / "suite")) == 60


def fit_and_write(root):
    """A fit of this rank, with a logger of its own folder name."""
    warnings.simplefilter("ignore")
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    logger = TensorBoardLogger(root, "", "")
    callbacks = stability_callbacks()
    fit_rank(root, "ddp", callbacks, logger=logger, max_steps=10, log_every_n_steps=1)
    return rank, callbacks[0].state_dict()["attempts"]


@pytest.mark.slow
def test_only_the_first_rank_writes_and_all_count_alike(tmp_path):
    """Invariant 5."""
    counted = run_ranks(fit_and_write, tmp_path / "run", folder=tmp_path)
    assert [count for _, count in counted] == [10, 10]
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    assert len(rows(tmp_path / "run")) == 10


class EveryThird:
    """Objects to every third step, and asks for nothing."""

    def check(self, stats):
        if stats.step % 3:
            return None
        fields = {"kind": "made up", "signal": "x", "value": 1.0, "message": "every third step"}
        return Anomaly(step=stats.step, warn_only=True, **fields)

    def update(self, stats):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_event_file_of_a_run_of_incidents_is_bounded_and_the_record_has_all(tmp_path, monkeypatch):
    """An incident every third step is what filled 79 MB in 9,000 steps."""
    monkeypatch.setattr("lit_stability.tensorboard.tab_writer.WITH_STEPS", 150_000)
    monkeypatch.setattr("lit_stability.tensorboard.tab_writer.WITHOUT_STEPS", 50_000)
    monkeypatch.setattr("lit_stability.tensorboard.tab_writer.EXTRA_STEPS", 20_000)
    monkeypatch.setattr("lit_stability.loggers.writer.TEXTS", 20_000)
    monitor = GradientMonitor(detectors=[EveryThird()], close_after=1)
    data = regression_data(300)
    run(tmp_path, [monitor], max_steps=300, log_every_n_steps=50, data=data)
    files = [file for file in tmp_path.iterdir() if "tfevents" in file.name]
    assert sum(file.stat().st_size for file in files) < 300_000
    assert len(read_incidents(tmp_path)) == 100
    found = {record["id"]: record for record in incidents(tmp_path)}
    assert 10 < len(found) < 100
    assert "window" in found[1]
    assert "window" not in found[max(found)]
    assert all(record["outcome"] != "open" for record in found.values())


def test_long_list_of_responses_is_shortened_in_the_tab_and_whole_in_the_record(tmp_path):
    """An incident that never ends gets a response in each step."""

    class Again(StabilityCallback):
        def on_incident(self, trainer, pl_module, incident):
            incident.resolve(SkipStep())

    class Always(EveryThird):
        def check(self, stats):
            anomaly = EveryThird.check(self, dataclasses.replace(stats, step=0))
            return dataclasses.replace(anomaly, step=stats.step, warn_only=False)

    monitor = GradientMonitor(detectors=[Always()])
    with contextlib.suppress(TrainingStopped):
        run(tmp_path, [monitor, Again()], max_steps=400, max_epochs=1, data=regression_data(400))
    (whole,) = read_incidents(tmp_path)
    assert len(whole["responses"]) > 300
    shown = incidents(tmp_path)[-1]["responses"]
    assert len(shown) == 201
    assert shown[100] == f"{len(whole['responses']) - 200} more"


def test_incident_that_is_amended_later_keeps_the_steps_around_it(tmp_path):
    """Its folder is pruned, or it turns out to recur, long after its last record was written."""
    faults = FaultInjector([NanLoss(step=s) for s in (20, 60, 100)])
    suite = [GradientMonitor(), AnomalyCheckpoint(max_incidents=2), stability_callbacks()[-1]]
    run(tmp_path, [faults, *suite], max_steps=120)
    records = [each for each in incidents(tmp_path) if each["id"] == 2]
    assert [each["pruned"] for each in records] == [False, False, False, True]
    before, after = records[-2:]
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"pruned"}
    assert len(after["window"]["rows"]) > 40
