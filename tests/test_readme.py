"""What the README shows works as it stands there, and what the guide on extensions adds is used."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger

from lit_stability import (
    AutoRollback,
    Diagnosis,
    GradientMonitor,
    read_incidents,
    stability_callbacks,
)
from lit_stability.cli.main import main
from lit_stability.diagnosis import CAUSES
from lit_stability.faults import FaultInjector, ScaleGradients
from tests.conftest import Regression, fit, regression_data

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf8")
GUIDE = (ROOT / "docs/guides/extend.md").read_text(encoding="utf8")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def names():
    """What the guide about one's own detector, responder and cause defines."""
    known = dict(CAUSES)
    found = {}
    for block in PYTHON.findall(GUIDE)[:4]:
        exec(block, found)
    yield found
    CAUSES.clear()
    CAUSES.update(known)


def test_readme_is_read_in_five_minutes():
    assert len(TEXT.splitlines()) <= 150
    assert len(TEXT.split()) <= 1200


def test_default_suite_is_listed_in_its_order():
    (listed,) = re.findall(r"`stability_callbacks\(\)` is `\[(.*?)\]`", TEXT, re.DOTALL)
    assert re.findall(r"(\w+)\(", listed) == [type(c).__name__ for c in stability_callbacks()]


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_first_block_trains(tmp_path, monkeypatch):
    """With a logger in the place of W&B's, which needs an account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", lambda project: CSVLogger("logs"))

    class Short(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop = self.trainer.global_step >= 3

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return regression_data()

    model = Short()
    shown = {"model": model, "datamodule": Data()}
    first, second = PYTHON.findall(TEXT)
    exec(first.replace("(logger=", "(accelerator='cpu', enable_progress_bar=False, logger="), shown)
    exec(second, shown)
    assert shown["trainer"].global_step >= 3


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_detector_and_cause_of_ones_own_tell_of_an_incident(names, tmp_path):
    below = names["LossBelow"](1e9)
    fit(tmp_path, [GradientMonitor(detectors=[below]), Diagnosis()], max_steps=5)
    (incident,) = read_incidents(tmp_path)
    assert incident["kind"] == "loss below its floor"
    assert incident["cause"] == "leak of the labels"
    assert incident["responses"] == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_responder_of_ones_own_comes_before_the_rollback(names, tmp_path):
    struck = FaultInjector([ScaleGradients(step=50, factor=1e4)])
    fit(tmp_path, [struck, GradientMonitor(), names["SkipSpikes"](), AutoRollback()], max_steps=70)
    (incident,) = read_incidents(tmp_path)
    assert incident["kind"] == "gradient spike"
    assert incident["responses"] == ["step skipped"]
    assert incident["outcome"] == "recovered"


@pytest.mark.parametrize("command", sorted(set(re.findall(r"lit-stability (\w+)", TEXT))))
def test_command_is_there(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./]+)\)", TEXT))))
def test_file_is_there(path):
    assert (ROOT / path).exists()
