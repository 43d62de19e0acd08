"""Where files go: to a local folder that was given, or nowhere, and the log says so."""

import pytest
import torch

from lit_stability import (
    CrashPrediction,
    GradientFlow,
    Preflight,
    find_last_good,
    read_incidents,
    stability_callbacks,
)
from lit_stability.callbacks import GradientMonitor
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import Regression, make_trainer, regression_data

pytestmark = pytest.mark.usefixtures("empty_pictures")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def rescued(root, **options):
    """A fit through two incidents with everything that writes files."""
    faults = FaultInjector([NanLoss(step=20), CorruptWeight(step=35)])
    more = [CrashPrediction(), GradientFlow(every_n_steps=40), Preflight()]
    suite = stability_callbacks()
    callbacks = [faults, suite[0], *more, *suite[1:]]
    trainer = make_trainer(root, callbacks, max_steps=60, **options)
    trainer.fit(Regression(), regression_data())
    return trainer, suite[0]


@pytest.mark.parametrize("root", ["memory://runs/a", "memory://runs"])
def test_remote_root_is_said_and_nothing_local_is_written(root, tmp_path, caplog):
    _, monitor = rescued(root, enable_checkpointing=True)
    assert [i.outcome for i in monitor.incidents] == ["recovered", "recovered"]
    assert files(tmp_path) == ["here"]
    assert caplog.text.count(f"{root} is not on a local file system") == 1


def test_trainer_that_writes_nothing_has_no_file_in_the_working_directory(tmp_path, caplog):
    _, monitor = rescued(None)
    assert [i.outcome for i in monitor.incidents] == ["recovered", "recovered"]
    assert files(tmp_path) == ["here"]
    assert caplog.text.count("no logger, no checkpoint callback and no default_root_dir") == 1


@pytest.mark.parametrize("root", ["../there", "file://{}/there"])
def test_local_root_that_was_given_holds_the_record(root, tmp_path):
    rescued(root.format(tmp_path))
    assert files(tmp_path / "here") == []
    assert len(read_incidents(tmp_path / "there")) == 2
    assert find_last_good(tmp_path / "there") is not None


def test_trainer_with_a_checkpoint_callback_records_in_the_working_directory(tmp_path):
    """As the checkpoints do."""
    rescued(None, enable_checkpointing=True)
    (record,) = (tmp_path / "here" / "stability").glob("*/incidents.jsonl")
    assert {i["run"] for i in read_incidents(tmp_path)} == {record.parent.name}


def test_resume_from_a_remote_checkpoint_writes_nothing_local(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=10)
    trainer.fit(Regression(), regression_data())
    trainer.save_checkpoint("memory://saved/good/step=00000010.ckpt")
    resumed = make_trainer(tmp_path / "there", stability_callbacks(), max_steps=20)
    resumed.fit(Regression(), regression_data(), ckpt_path="memory://saved/good/step=00000010.ckpt")
    assert resumed.global_step == 20
    assert files(tmp_path / "here") == []


def test_monitor_alone_writes_nothing_to_the_working_directory(tmp_path):
    faults = FaultInjector([NanLoss(step=5)])
    trainer = make_trainer(None, [faults, GradientMonitor()], max_steps=10)
    trainer.fit(Regression(), regression_data())
    assert not all(torch.isfinite(p).all() for p in trainer.lightning_module.parameters())
    assert files(tmp_path) == ["here"]
