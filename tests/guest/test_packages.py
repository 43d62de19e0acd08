"""Under which packages of Lightning the suite works, and which versions it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lit_stability
from lit_stability import stability_callbacks
from lit_stability.versions import NEEDED, installed
from tests.project import PYPROJECT

ROOT = Path(lit_stability.__file__).parents[1]
SUITE = [type(callback).__name__ for callback in stability_callbacks()]


def python(*words, **env):
    """Runs an interpreter that has imported nothing, without what the shell may have set."""
    ours = ("LIT_STABILITY_LIGHTNING", "LIT_STABILITY_AUTO")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The fits of `pytorch_lightning`: what each scenario found, and the console."""
    if installed("pytorch-lightning") is None:
        pytest.skip("pytorch-lightning is not installed")
    folder = tmp_path_factory.mktemp("pytorch_lightning")
    info = folder / "site/lit_stability-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lit-stability\n")
    (info / "entry_points.txt").write_text(entry_points("pytorch_lightning.callbacks_factory"))
    path = os.pathsep.join([str(info.parent), str(ROOT)])
    done = python("-m", "tests.guest.under_pytorch_lightning", folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text()), done.stderr


def entry_points(group):
    """The entry points of a group, as the installed package has them."""
    points = PYPROJECT["project"]["entry-points"][group]
    return f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())


def test_healthy_run_of_pytorch_lightning_is_bit_identical_to_the_bare_one(run):
    """With the states of EarlyStopping, ModelCheckpoint and WeightAveraging, and the metrics."""
    assert run[0]["healthy"] == {"same": True}


def test_damaged_weight_under_pytorch_lightning_is_rolled_back_to_the_undisturbed_run(run):
    """The callbacks of Lightning are restored with it, so they are recognised."""
    incidents = [["non-finite weight", "rolled back and replayed", "recovered"]]
    assert run[0]["damaged_weight"] == {"same": True, "incidents": incidents}


def test_nan_under_pytorch_lightning_is_recorded_and_its_step_retried(run):
    found = run[0]["nan_loss"]
    assert found["incidents"] == [["non-finite loss", "step retried", "recovered"]]
    assert found["records"] == ["non-finite loss"]
    assert found["version"], "the checkpoint of the incident has another version of Lightning"
    assert {"AutoRollback", "EarlyStopping", "GradientMonitor"} <= {*found["callbacks"]}


def test_incident_is_logged_where_pytorch_lightning_logs(run):
    assert "incident 1 at step 20: non-finite loss" in run[1]


def test_precision_is_lowered_with_a_plugin_of_pytorch_lightning(run):
    done = "precision 16-mixed -> bf16-mixed, step retried"
    found = run[0]["overflow"]
    assert found["incidents"] == [["non-finite loss", done, "recovered"]]
    assert (found["precision"], found["package"]) == ("bf16-mixed", "pytorch_lightning")


def test_strategies_of_pytorch_lightning_are_recognised(run):
    assert run[0]["strategies"] == {"one device": "alone", "DDP": "replicas", "FSDP2": "shards"}


def test_sample_that_cannot_be_read_is_left_out_by_a_fit_with_recovery(run):
    assert run[0]["broken_sample"] == {"crashes": [["data", "OSError"]], "steps": 60}


def test_callbacks_are_those_of_pytorch_lightning_and_can_be_pickled(run):
    assert run[0]["copies"] == {"pickled": SUITE, "of_the_package": True}


def test_trainer_of_pytorch_lightning_has_the_suite_by_the_environment_variable(run):
    assert run[0]["automatic"] == ["AutomaticSuite", *SUITE]


def test_command_fits_a_model_of_pytorch_lightning_with_its_trainer_and_logger(run):
    assert run[0]["command"]["fit"] == 0
    assert run[0]["command"]["events"] == 1


def test_command_refuses_a_model_of_the_other_package_with_what_to_set(run):
    message = run[0]["command"]["message"]
    assert run[0]["command"]["refused"] == 2
    assert "expected a mapping whose _target_ is a LightningModule; this is one of" in message
    assert "set LIT_STABILITY_LIGHTNING=lightning, or" in message


def test_callbacks_of_pytorch_lightning_are_told_from_those_of_the_user(run):
    assert run[0]["states"] == {"Counter": True, "Timer": False}


def test_classes_that_a_config_may_build_exist_in_pytorch_lightning(run):
    assert run[0]["components"] == {"found": 13, "missing": []}


@pytest.mark.parametrize("place", ["explicit", "recovery"])
def test_trainer_of_the_other_package_is_refused_with_what_to_set(place, run):
    message = run[0]["other_package"][place]
    assert "of lightning.pytorch, but lit_stability was imported for pytorch_light" in message
    assert "set LIT_STABILITY_LIGHTNING=lightning, or import lightning.pytorch before" in message


def test_trainer_of_the_other_package_is_left_alone_by_the_automatic_suite(run):
    found = run[0]["other_package"]
    assert found["automatic"] == ["AutomaticSuite", "ModelCheckpoint"]
    assert found["steps"] == 2
    assert "LIT_STABILITY_AUTO=1 adds nothing: AutomaticSuite was given to a Trainer of" in run[1]


def test_callbacks_are_of_the_package_that_is_imported_after_them():
    """As imports are sorted: `lightning`, which is installed too, is not loaded then."""
    program = (
        "from lit_stability import GradientMonitor\nfrom pytorch_lightning import Callback\n"
        "import sys\nassert issubclass(GradientMonitor, Callback)\n"
        "assert 'lightning' not in sys.modules"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *(("lightning", "2.5.1"), ("lightning", "2.6.2"), ("torch", "2.4.0")),
        *(("pytorch-lightning", "2.5.1"), ("pytorch-lightning", "2.6.3")),
    ],
)
def test_version_that_will_not_do_is_refused_at_import_with_the_command(name, version, tmp_path):
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    used = "pytorch_lightning" if name == "pytorch-lightning" else "lightning"
    code = "import lit_stability; lit_stability.GradientMonitor"
    done = python("-c", code, PYTHONPATH=path, LIT_STABILITY_LIGHTNING=used)
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert message.startswith(f"ImportError: lit_stability needs {name}>=")
    wanted = NEEDED[name.removeprefix("pytorch-")]
    assert f"found {version}; run pip install '{name}{wanted}'" in message


def test_versions_needed_are_those_that_pip_gets():
    dependencies = PYPROJECT["project"]["dependencies"]
    assert {f"{name}{wanted}" for name, wanted in NEEDED.items()} <= set(dependencies)
