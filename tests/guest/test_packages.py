"""Beside which packages the suite works, and how it refuses the others."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lit_stability
from lit_stability import stability_callbacks
from lit_stability.versions import NEEDED
from tests.conftest import regression_data
from tests.project import PYPROJECT

_log = logging.getLogger("pytorch_lightning")
_level = _log.level
pytorch_lightning = pytest.importorskip("pytorch_lightning")
_log.setLevel(_level)  # which the import lowers, for the tests of all other files too
ROOT = Path(lit_stability.__file__).parents[1]


class Foreign(pytorch_lightning.LightningModule):
    """A module of the other package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.parametrize("name", ["GradientMonitor", "Preflight", "AutoRollback", "Diagnosis"])
def test_trainer_of_pytorch_lightning_is_refused_with_the_import_to_change(name, tmp_path):
    trainer = pytorch_lightning.Trainer(
        callbacks=[getattr(lit_stability, name)()],
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    message = (
        f"{name} is a callback of lightning.pytorch.*a Trainer of pytorch_lightning.*from light"
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(Foreign(), regression_data(2))


def test_module_of_pytorch_lightning_is_refused_by_the_trainer_of_lightning(tmp_path):
    from lightning.pytorch import Trainer

    trainer = Trainer(
        callbacks=stability_callbacks(),
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
    )
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer.fit(Foreign(), regression_data(2))


def installed_with(folder, **versions):
    """What `import lit_stability.callbacks` ends with beside these installed versions."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join([str(folder), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", "import lit_stability; lit_stability.GradientMonitor"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stderr.strip().splitlines()[-1] if run.stderr else ""


@pytest.mark.parametrize(
    ("name", "version"), [("lightning", "2.5.1"), ("lightning", "2.6.2"), ("torch", "2.4.0")]
)
def test_version_that_will_not_do_is_refused_at_import_with_the_command(name, version, tmp_path):
    code, message = installed_with(tmp_path, **{name: version})
    assert code == 1
    assert message.startswith(f"ImportError: lit_stability needs {name}>=")
    assert f"found {version}; run pip install '{name}{NEEDED[name]}'" in message


def test_versions_needed_are_those_that_pip_gets():
    dependencies = PYPROJECT["project"]["dependencies"]
    assert {f"{name}{wanted}" for name, wanted in NEEDED.items()} <= set(dependencies)
