"""Common mistakes, and the messages for them."""

import pytest
import torch
from torch import nn

import lit_stability
from lit_stability import (
    AutoRollback,
    CrashPrediction,
    Diagnosis,
    GradientMonitor,
    PrecisionFallback,
    Preflight,
    read_incidents,
    stability_callbacks,
)
from lit_stability.cli.main import main
from lit_stability.detectors import DetectorSet, Divergence, NonFinite, Spike
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit, make_trainer, regression_data


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientMonitor(detectors=["spike"]), "detectors must be objects.*got 'spike'"),
        (lambda: GradientMonitor(detectors="spike"), "detectors must be objects.*got 's'"),
        (lambda: GradientMonitor(detectors=[NonFinite]), "detectors must be objects.*<class"),
        (lambda: GradientMonitor(history=0), "history must be at least 1, got 0"),
        (lambda: GradientMonitor(allow_strategies="Mine"), "must be a list, got 'Mine'"),
        (lambda: AutoRollback(budget={"skips": 1}), r"got \{'skips': 1\}; write budget=Budget\("),
        (lambda: AutoRollback(snapshot_every=float("nan")), "snapshot_every.*got nan"),
        (lambda: CrashPrediction(levels={"stop": 1}), r"write levels=RiskLevels\(.*lit_stab.*risk"),
        (lambda: Preflight(memorise=20), r"got 20; write memorise=Memorise\("),
        (lambda: PrecisionFallback(fp32_modules="head"), "must be a list, got 'head'"),
    ],
)
def test_option_of_the_wrong_kind_is_refused_when_it_is_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", lit_stability.__all__)
def test_misspelt_option_is_a_type_error(name):
    kind = getattr(lit_stability, name)
    with pytest.raises(TypeError):
        kind(no_such_option=1)


def test_bound_for_a_layer_that_is_not_there_is_refused_with_names_that_are(tmp_path):
    """S18: it would bound nothing, in silence."""
    callbacks = [GradientMonitor(layer_bounds={"encoder.*": 1.0})]
    with pytest.raises(ValueError, match=r"no parameter matches 'encoder\.\*'.*net\.0\.weight"):
        fit(tmp_path, callbacks)


@pytest.mark.parametrize("kind", [GradientMonitor, AutoRollback])
def test_callback_given_twice_is_refused_when_the_trainer_is_created(kind, tmp_path):
    with pytest.raises(ValueError, match=f"callbacks have {kind.__name__} twice; stability_callb"):
        make_trainer(tmp_path, [GradientMonitor(), kind(), kind()])


def test_callback_derived_from_ours_and_given_twice_is_refused_in_the_fit(tmp_path):
    class Untitled(Diagnosis):
        """Of a class of its own, so that Lightning sees nothing in it."""

        state_key = property(lambda self: str(id(self)))

    with pytest.raises(ValueError, match=r"has Untitled twice, found \['GradientMonitor', 'Unt"):
        fit(tmp_path, [GradientMonitor(), Untitled(), Untitled()])


def test_record_that_cannot_be_written_is_reported_once_and_training_continues(tmp_path, caplog):
    (tmp_path / "incidents.jsonl").mkdir()
    faults = FaultInjector([NanLoss(step=10), NanLoss(step=35)])
    _, trainer = fit(tmp_path, [faults, *stability_callbacks()], max_steps=55)
    assert trainer.global_step == 55
    lines = [r.getMessage() for r in caplog.records if "cannot be recorded" in r.getMessage()]
    assert len(lines) == 1
    assert "give the Trainer a default_root_dir" in lines[0]


def checkpoint(root, callbacks, module=Regression):
    _, trainer = fit(root, callbacks, module, max_steps=30)
    trainer.save_checkpoint(root / "saved.ckpt")
    return root / "saved.ckpt"


def resumed(root, callbacks, path, steps=55, module=Regression):
    trainer = make_trainer(root, callbacks, max_steps=steps)
    trainer.fit(module(), regression_data(), ckpt_path=path)
    return trainer


SUITES = {
    "none": list,
    "suite": stability_callbacks,
    "monitor": lambda: [GradientMonitor()],
    "reversed": lambda: [GradientMonitor(), *stability_callbacks()[:0:-1]],
}


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
@pytest.mark.parametrize("before", ["none", "suite"])
@pytest.mark.parametrize("after", SUITES)
def test_resume_with_other_callbacks_goes_on(before, after, tmp_path):
    path = checkpoint(tmp_path, SUITES[before]())
    suite = [FaultInjector([NanLoss(step=40)]), *SUITES[after]()]
    trainer = resumed(tmp_path, suite, path)
    assert trainer.global_step == 55
    if after in ("suite", "reversed"):
        assert read_incidents(tmp_path)[-1]["outcome"] == "recovered"


def test_resume_with_other_detectors_gives_each_its_own_window(tmp_path):
    """As many as before, in another order, one of another class."""
    path = checkpoint(tmp_path, [GradientMonitor(detectors=[Spike("loss"), Spike("grad_norm")])])
    saved = torch.load(path)["callbacks"]["GradientMonitor"]["detectors"]
    panel = DetectorSet([Spike("grad_norm"), Divergence()], [0], print)
    panel.load_state_dict(saved)
    windows = dict(panel.state_dict()["0"])
    assert windows["Spike grad_norm 0"] == dict(saved["0"])["Spike grad_norm 0"]
    assert windows["Spike grad_norm 0"] != Spike("grad_norm").state_dict()
    assert windows["Divergence 0"] == Divergence().state_dict()
    monitor = GradientMonitor(detectors=[Spike("grad_norm"), Divergence()])
    assert resumed(tmp_path, [monitor], path).global_step == 55


def test_resume_at_its_last_step_takes_none(tmp_path):
    path = checkpoint(tmp_path, stability_callbacks())
    assert resumed(tmp_path, stability_callbacks(), path, steps=30).global_step == 30


def test_resume_of_another_model_names_the_weights_that_differ(tmp_path):
    class Wider(Regression):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(32, 2)

    path = checkpoint(tmp_path, stability_callbacks())
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.4\.weight"):
        resumed(tmp_path, stability_callbacks(), path, module=Wider)


CONFIG = """
model: {_target_: tests.conftest.Regression}
trainer: {accelerator: cpu, max_steps: 1}
logger: null
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run_dir=file/x"], "run_dir=file/x: cannot be written"),
        (["--resume", "file"], "resume=file: it is truncated, or not a checkpoint"),
        (["trainer.accelerator=cuda"], "accelerator is not available"),
        (["trainer.max_step=3"], "did you mean max_steps"),
    ],
)
def test_command_that_cannot_work_exits_with_2_and_no_traceback(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available() and "cuda" in words[0]:
        pytest.skip("there is a CUDA device")
    (tmp_path / "file").write_text("no folder, no checkpoint")
    (tmp_path / "given.yaml").write_text(CONFIG)
    assert main(["fit", "-c", "given", *words]) == 2
    assert message in capsys.readouterr().err


def test_report_that_cannot_be_written_is_reported_as_a_wrong_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    data = "data: {_target_: tests.guest.test_lightning_cli.Numbers}\n"
    (tmp_path / "given.yaml").write_text(CONFIG + data)
    assert main(["check", "-c", "given", "--out", "file/x.json"]) == 2
    assert "--out file/x.json: cannot be written" in capsys.readouterr().err
