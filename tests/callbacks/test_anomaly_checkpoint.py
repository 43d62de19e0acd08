import json
import os
import resource
import time

import pytest
import torch
from torch.utils.data import DataLoader

from lit_stability import AnomalyCheckpoint, GradientMonitor, read_incidents, stability_callbacks
from lit_stability.faults import BadBatch, FaultInjector, NanLoss, ScaleGradients
from tests.conftest import Regression, fit, flat, make_trainer, regression_data


def incident_folders(root):
    return sorted((root / "incidents").iterdir())


def whole_folders(root):
    return [f.name for f in incident_folders(root) if (f / "scene.pt").exists()]


def test_folder_holds_state_batch_history_statistics_and_versions(tmp_path):
    """S1, S11: what a person needs in the morning, saved before anything was done about it."""
    callbacks = [FaultInjector([BadBatch(step=30)]), *stability_callbacks()]
    fit(tmp_path, callbacks, max_steps=60)
    (folder,) = incident_folders(tmp_path)
    assert folder.name == "00000030-1"
    (incident,) = read_incidents(tmp_path)
    assert incident["path"] == str(folder)

    context = torch.load(folder / "scene.pt", weights_only=False)
    x, y = context["batch"]
    assert torch.isnan(x).all()
    assert torch.isnan(y).all()
    assert (context["step"], context["batch_idx"], context["epoch"]) == (30, 30, 0)
    assert {g["name"] for g in context["gradients"]} >= {"net.0.weight", "net.4.bias"}
    assert set(context["rng"]) == {"python", "numpy", "torch", "accelerator"}

    history = json.loads((folder / "history.json").read_text())
    assert history["steps"] == list(range(31))
    assert history["losses"][-1] == "nan"
    assert all(isinstance(v, float) for v in history["losses"][:-1])
    assert history["versions"]["torch"] == torch.__version__
    assert history["optimizers"][0]["groups"][0]["lr"] == 1e-2

    report = (folder / "report.md").read_text()
    assert "non-finite loss" in report
    assert "step skipped" in report
    assert "recovered" in report, "the report is written again when the outcome is known"


def test_incident_checkpoint_loads_as_a_lightning_checkpoint(tmp_path):
    """S11: model, optimizer, scheduler, loops and callbacks are in it."""
    callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks()]
    fit(tmp_path, callbacks, lambda: Regression(scheduler="onecycle"))
    path = incident_folders(tmp_path)[0] / "checkpoint.ckpt"
    saved = torch.load(path, weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(saved)
    module = Regression(scheduler="onecycle")
    trainer = make_trainer(tmp_path, stability_callbacks(), max_steps=50)
    trainer.fit(module, regression_data(), ckpt_path=path)
    assert trainer.global_step == 50
    assert torch.isfinite(flat(module)).all()


def test_history_keeps_the_last_hundred(tmp_path):
    """S1: the last 100 losses and gradient norms, the offending one last."""
    callbacks = [FaultInjector([ScaleGradients(step=150)]), *stability_callbacks()]
    fit(tmp_path, callbacks, max_steps=160)
    history = json.loads((incident_folders(tmp_path)[0] / "history.json").read_text())
    assert history["steps"] == list(range(51, 151))
    assert history["grad_norms"][-1] > 100 * max(history["grad_norms"][:-1])


def test_folders_are_bounded_first_and_newest_stay_and_the_others_keep_reports(tmp_path, caplog):
    faults = [NanLoss(step=s) for s in (20, 40, 60, 80, 100)]
    callbacks = [
        FaultInjector(faults),
        GradientMonitor(),
        AnomalyCheckpoint(max_incidents=3),
        stability_callbacks()[-1],
    ]
    fit(tmp_path, callbacks, max_steps=120)
    found = read_incidents(tmp_path)
    assert [i["pruned"] for i in found] == [False, True, True, False, False]
    assert whole_folders(tmp_path) == ["00000020-1", "00000080-4", "00000100-5"]
    second = incident_folders(tmp_path)[1]
    assert [f.name for f in second.iterdir()] == ["report.md"]
    assert "pruned to make room" in (second / "report.md").read_text()
    assert f"{second} was pruned" in caplog.text


def test_incident_folders_of_another_run_in_the_same_folder_are_not_touched(tmp_path):
    """Two runs of a logger with a fixed version; the second numbers its incidents anew."""
    for _ in range(2):
        faults = FaultInjector([NanLoss(step=s) for s in (20, 40, 60)])
        suite = [GradientMonitor(), AnomalyCheckpoint(max_incidents=2), stability_callbacks()[-1]]
        fit(tmp_path, [faults, *suite], max_steps=80)
    found = read_incidents(tmp_path)
    assert [(i["id"], i["pruned"]) for i in found] == [(1, False), (2, True), (3, False)] * 2
    assert len({i["run"] for i in found}) == 2
    assert len(whole_folders(tmp_path)) == 4


def test_deleted_folder_of_a_repeated_incident_is_not_missed(tmp_path, caplog):
    class NanInLog(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + (-loss).log() if batch[0][0, 0] == 9 else loss

    data = regression_data(158)
    data.dataset.tensors[0][20 * 16 :: 20 * 16, 0] = 9
    suite = stability_callbacks()
    fit(tmp_path, suite, NanInLog, data, max_steps=150)
    assert len(suite[0].incidents) == 7
    assert len(suite[0].incidents[-1].repeats) == 6
    assert len(whole_folders(tmp_path)) == 5
    assert "was not updated" not in caplog.text


def test_folders_are_bounded_in_bytes(tmp_path):
    faults = [NanLoss(step=s) for s in (20, 40, 60)]
    suite = [GradientMonitor(), AnomalyCheckpoint(max_bytes=1), stability_callbacks()[-1]]
    fit(tmp_path, [FaultInjector(faults), *suite], max_steps=80)
    assert whole_folders(tmp_path) == ["00000020-1", "00000060-3"]


def test_unwritable_folder_is_logged_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "incidents").write_text("in the way")
    callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks()]
    _, trainer = fit(tmp_path, callbacks)
    assert trainer.global_step == 60
    assert "was not saved" in caplog.text
    assert (tmp_path / "incidents").read_text() == "in the way"
    assert read_incidents(tmp_path)[0]["outcome"] == "recovered"


def test_full_disk_is_logged_and_leaves_no_half_folder(tmp_path, caplog):
    callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        _, trainer = fit(tmp_path, callbacks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer.global_step == 60
    assert "was not saved" in caplog.text
    assert incident_folders(tmp_path) == []


def test_batch_that_does_not_pickle_is_logged_and_training_goes_on(tmp_path, caplog):
    def collate(rows):
        x, y = zip(*rows, strict=True)
        return torch.stack(x), torch.stack(y), lambda: "cannot be pickled"

    class Ignores(Regression):
        def training_step(self, batch, batch_idx):
            x, y, _ = batch
            return torch.nn.functional.mse_loss(self.net(x).squeeze(-1), y)

    data = DataLoader(regression_data().dataset, 16, collate_fn=collate)
    callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks()]
    _, trainer = fit(tmp_path, callbacks, Ignores, data)
    assert trainer.global_step == 60
    assert "was not saved" in caplog.text
    assert incident_folders(tmp_path) == []


class Killed(BaseException):
    """As sudden as a kill, but for the test process."""


class Unsaveable(Regression):
    """Dies in the middle of writing its checkpoint."""

    def on_save_checkpoint(self, checkpoint):
        raise Killed


def test_kill_while_saving_leaves_no_folder_that_looks_whole(tmp_path):
    callbacks = [FaultInjector([NanLoss(step=30)]), GradientMonitor(), AnomalyCheckpoint()]
    with pytest.raises(Killed):
        fit(tmp_path, callbacks, Unsaveable)
    assert incident_folders(tmp_path) == []


def test_part_left_by_a_kill_is_removed_at_a_later_start(tmp_path):
    old, new = (tmp_path / "incidents" / f".part-another-{name}" for name in ("old", "new"))
    for part in (old, new):
        part.mkdir(parents=True)
    os.utime(old, (0, time.time() - 100_000))
    fit(tmp_path, stability_callbacks(), max_steps=2)
    assert incident_folders(tmp_path) == [new], "another run may be writing it"


@pytest.mark.parametrize(
    ("option", "value"), [("history", 0), ("max_incidents", 1), ("max_bytes", 0)]
)
def test_option_out_of_range_is_refused_with_its_value(option, value):
    with pytest.raises(ValueError, match=rf"{option} must be at least \d+, got {value}"):
        AnomalyCheckpoint(**{option: value})
