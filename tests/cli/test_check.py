"""`lit-stability check`: what it prints, returns and leaves alone."""

import json
import sys
from pathlib import Path

import pytest

import lit_stability
from lit_stability.cli.main import main

ROOT = Path(lit_stability.__file__).parents[1]
MODULE = """
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Local(LightningModule):
    def __init__(self, scale: float = 1.0, batches: int = 4) -> None:
        super().__init__()
        self.net, self.scale, self.batches = nn.Linear(8, 4), scale, batches

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]) * self.scale, batch[1])

    def train_dataloader(self):
        n = 16 * self.batches
        return DataLoader(TensorDataset(torch.randn(n, 8), torch.randint(4, (n,))), 16)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Freeze(Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.net.bias.requires_grad_(False)
"""
CONFIG = """
seed: 0
model: {_target_: check_targets.Local}
trainer: {accelerator: cpu, max_steps: 5, log_every_n_steps: 1}
callbacks:
  monitor: {_target_: lit_stability.GradientMonitor}
"""


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """A project folder with one config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "check_targets", raising=False)
    (tmp_path / "check_targets.py").write_text(MODULE)
    (tmp_path / "small.yaml").write_text(CONFIG)
    return tmp_path


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if "__pycache__" not in p.parts)


def test_check_of_a_healthy_config_exits_with_0_and_writes_nothing(cwd, capsys):
    """C5."""
    before = files(cwd)
    assert main(["check", "-c", "small.yaml"]) == 0
    assert "preflight: nothing found in" in capsys.readouterr().out
    assert files(cwd) == before


def test_check_that_finds_an_error_exits_with_1_and_says_what_to_do(cwd, capsys):
    """C5."""
    assert main(["check", "-c", "small.yaml", "model.scale=1000"]) == 1
    out = capsys.readouterr().out
    assert "error: the cross entropy of 16 targets is" in out
    assert "do:  initialise the head small" in out


def test_check_with_out_writes_the_report_as_json(cwd):
    assert main(["check", "-c", "small.yaml", "model.scale=1000", "--out", "a/report.json"]) == 1
    report = json.loads((cwd / "a/report.json").read_text())
    assert report["version"] == 1
    assert report["findings"][0]["severity"] == "error"
    assert "gradients" in report["ran"]


def test_report_of_another_check_is_kept(cwd):
    command = ["check", "-c", "small.yaml", "--out", "report.json"]
    main([*command, "model.scale=1000"])
    before = (cwd / "report.json").read_text()
    main(command)
    assert (cwd / "report.1.json").read_text() == before
    assert (cwd / "report.json").read_text() != before


def test_check_takes_the_options_of_the_preflight_in_the_config(cwd, capsys):
    """C5: the backbone that is not frozen."""
    asked = "callbacks.check={_target_: lit_stability.Preflight, frozen: [net.*], on_error: stop}"
    assert main(["check", "-c", "small.yaml", asked]) == 1
    assert "2 parameters meant to be frozen" in capsys.readouterr().out


def test_check_calls_the_callbacks_that_freeze(cwd, capsys):
    asked = "callbacks.freeze={_target_: check_targets.Freeze}"
    assert main(["check", "-c", "small.yaml", asked]) == 0
    assert "32 of 36 weights train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [("model.scale=wide", "model.scale='wide'"), ("trainer.limit_train_batches=0", "no batch")],
)
def test_check_of_a_config_that_cannot_run_exits_with_2(override, message, cwd, capsys):
    assert main(["check", "-c", "small.yaml", override]) == 2
    assert message in capsys.readouterr().err


def test_check_of_the_bundled_translation_config_finds_nothing(tmp_path, monkeypatch, capsys):
    """T3, T4: no false alarm on the model that trains."""
    pytest.importorskip("sacrebleu")
    monkeypatch.chdir(ROOT)
    data = "data={n_train: 200, n_val: 10, n_test: 10}"
    code = main(["check", "-c", "translation_clean", data, f"run_dir={tmp_path}"])
    out = capsys.readouterr().out
    assert (code, "preflight: nothing found" in out) == (0, True), out
    assert "not run: masks" not in out
    assert files(tmp_path) == []
