"""The wheel: what is in it, and that it works where there is no clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

import lit_stability

ROOT = Path(lit_stability.__file__).parents[1]


def run(*words, cwd, **env):
    """What a command prints, in a folder, without the clone on its path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LIT_STABILITY_AUTO")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def old_setuptools():
    try:
        return Version(version("setuptools")) < Version("77")
    except ModuleNotFoundError:
        return True


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The file that `LIT_STABILITY_WHEEL` names, or one built from a copy.

    From a copy, as a folder `build/` that an earlier build left would find its way in.
    """
    if "LIT_STABILITY_WHEEL" in os.environ:
        return Path(os.environ["LIT_STABILITY_WHEEL"])
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    bytecode = shutil.ignore_patterns("__pycache__")
    for name in ("lit_stability", "configs", "tests", "models"):
        shutil.copytree(ROOT / name, copy / name, ignore=bytecode)
    isolated = [] if old_setuptools() else ["--no-build-isolation"]
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "-q",
        "--no-deps",
        *isolated,
        "-w",
        "out",
        cwd=copy,
    )
    (built,) = (copy / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of a fresh environment: the wheel, and the packages below it as they are here."""
    folder = tmp_path_factory.mktemp("venv") / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install")
    run(*pip, "-q", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return folder / "bin"


def test_wheel_holds_the_package_its_page_and_nothing_else(wheel):
    """K2: no tests, no models, no configs."""
    names = set(zipfile.ZipFile(wheel).namelist())
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lit_stability").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == source
    assert {"lit_stability/py.typed", "lit_stability/tensorboard/static/index.js"} <= names
    assert wheel.name == f"lit_stability-{lit_stability.__version__}-py3-none-any.whl"


def test_wheel_registers_command_tab_and_callbacks(wheel):
    with zipfile.ZipFile(wheel) as file:
        (points,) = [n for n in file.namelist() if n.endswith("entry_points.txt")]
        text = file.read(points).decode()
    assert "lit-stability = lit_stability.cli.main:main" in text
    assert "[tensorboard_plugins]\nstability = lit_stability.tensorboard.loader:" in text
    for package in ("lightning.pytorch", "pytorch_lightning"):
        group = f"[{package}.callbacks_factory]"
        assert f"{group}\nstability = lit_stability.registration:" in text


def test_entry_points_of_the_installed_wheel_load(installed, tmp_path):
    code = (
        "import lit_stability; from importlib.metadata import entry_points\n"
        "print(lit_stability.__file__)\n"
        "groups = [f'{p}.callbacks_factory' for p in ('lightning.pytorch', 'pytorch_lightning')]\n"
        "for g in ('tensorboard_plugins', *groups):\n"
        "    (e,) = entry_points(group=g, name='stability'); print(e.load().__name__)"
    )
    where, tab, *factories = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed.parent)
    assert (tab, *factories) == ("StabilityLoader", "callbacks", "callbacks")


MODULE = """
import torch
from lightning.pytorch import LightningModule


class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def train_dataloader(self):
        data = [(torch.randn(8), i % 3) for i in range(32)]
        return torch.utils.data.DataLoader(data, 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)
"""


def test_installed_command_checks_a_module_of_the_users_own(installed, tmp_path):
    """K5: outside of the clone, in the folder that the user works in."""
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text(
        "model: {_target_: my_module.Mine}\ntrainer: {accelerator: cpu, max_steps: 10}\n"
    )
    assert "exit codes:" in run(installed / "lit-stability", "--help", cwd=tmp_path)
    told = run(installed / "lit-stability", "check", "-c", "mine", cwd=tmp_path)
    assert "preflight" in told
    assert {p.name for p in tmp_path.iterdir()} <= {"my_module.py", "mine.yaml", "__pycache__"}
