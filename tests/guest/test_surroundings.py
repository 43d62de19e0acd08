"""Where the suite is a guest: modules, loggers, file systems, terminals, kernels."""

import os
import re
import subprocess
import sys
from pathlib import PureWindowsPath
from unittest.mock import Mock

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lit_stability import (
    AutoRollback,
    CrashPrediction,
    GradientFlow,
    GradientMonitor,
    Preflight,
    read_incidents,
    stability_callbacks,
)
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.conftest import Regression, fit, make_trainer, regression_data


class Tables(Logger):
    """What `WandbLogger` offers: an experiment without files, text as tables."""

    def __init__(self):
        super().__init__()
        self.metrics, self.tables = [], []

    name = "project"
    version = "run-1"

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.tables.append((key, columns, data, step))


class Uploads(ModelCheckpoint):
    """A `ModelCheckpoint` in name: it initializes none of its attributes, and has no folder."""

    state_key = "Uploads"

    def __init__(self):
        self.epochs = 0

    def setup(self, *args, **kwargs):
        pass

    on_train_start = on_train_batch_end = on_validation_end = setup
    on_train_end = on_exception = setup

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]


def with_fault(*suite):
    return [FaultInjector([NanLoss(step=20)]), *suite]


def test_suite_of_the_module_takes_the_place_of_the_trainers(tmp_path):
    """`configure_callbacks`: Lightning leaves out what the Trainer was given of the same kinds."""

    class Guarded(Regression):
        def configure_callbacks(self):
            return [GradientMonitor(close_after=3), AutoRollback()]

    callbacks = with_fault(GradientMonitor(), AutoRollback(snapshot_every=5))
    _, trainer = fit(tmp_path, callbacks, Guarded, max_steps=30)
    assert [type(c).__name__ for c in trainer.callbacks[1:]] == ["GradientMonitor", "AutoRollback"]
    assert trainer.callbacks[1].close_after == 3
    assert [i.outcome for i in trainer.callbacks[1].incidents] == ["recovered"]


def test_logger_with_tables_is_given_scalars_and_the_incident(tmp_path):
    """As to wandb, whose experiment takes no text."""
    logger = Tables()
    fit(
        tmp_path,
        with_fault(*stability_callbacks()),
        logger=logger,
        log_every_n_steps=5,
        max_steps=40,
    )
    assert {"stability/grad_norm", "stability/incidents"} <= {
        k for _, m in logger.metrics for k in m
    }
    steps = [step for step, _ in logger.metrics]
    assert steps == sorted(steps), "wandb drops what is logged at a step that has passed"
    key, columns, (row,), _ = logger.tables[-1]
    assert key == "stability/incident_table"
    found = dict(zip(columns, row, strict=True))
    assert (found["step"], found["kind"], found["outcome"]) == (20, "non-finite loss", "recovered")


def test_several_loggers_are_all_given_the_same_scalars(tmp_path):
    loggers = [CSVLogger(tmp_path / "a"), Tables(), TensorBoardLogger(tmp_path / "b")]
    suite = stability_callbacks()
    fit(tmp_path, with_fault(*suite), logger=loggers, log_every_n_steps=5, max_steps=40)
    header = (tmp_path / "a/lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert "stability/grad_norm" in header.split(",")
    assert read_incidents(tmp_path / "a/lightning_logs/version_0")[0]["outcome"] == "recovered"
    assert list((tmp_path / "b").rglob("events*"))
    assert loggers[1].tables


@pytest.mark.usefixtures("empty_pictures")
def test_names_of_all_that_is_written_are_names_on_windows_too(tmp_path):
    faults = FaultInjector([NanLoss(step=15), CorruptWeight(step=30, parameter="net.0.*")])
    suite = [*stability_callbacks(), CrashPrediction(), GradientFlow(every_n_steps=10), Preflight()]
    fit(tmp_path, [faults, *suite], max_steps=60, enable_checkpointing=True)
    written = [p.relative_to(tmp_path) for p in tmp_path.rglob("*")]
    assert {"incidents.jsonl", "good"} <= {p.name for p in written}
    for path in written:
        windows = PureWindowsPath(path)
        assert windows.parts == path.parts, path
        for part in windows.parts:
            assert not re.search(r'[<>:"/\\|?*\x00-\x1f]|[. ]$', part), path
            assert not PureWindowsPath(part).is_reserved(), path


def test_run_on_a_dumb_terminal_with_a_progress_bar_reports_the_incident(
    tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setenv("TERM", "dumb")
    fit(tmp_path, with_fault(*stability_callbacks()), max_steps=40, enable_progress_bar=True)
    assert "incident 1 at step 20" in caplog.text
    assert "\x1b[" not in caplog.text


SCRIPT = """
from tests.conftest import fit
from tests.guest.test_surroundings import with_fault
from lit_stability import stability_callbacks
_, trainer = fit({root!r}, with_fault(*stability_callbacks()), max_steps=40)
raise SystemExit(trainer.global_step)
"""


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes them")
def test_run_with_stdout_and_stderr_closed_goes_on_through_an_incident(tmp_path):
    """As from a launcher that closes them: there is nowhere to print to."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(tmp_path)))
    done = subprocess.run(
        f'"{sys.executable}" "{script}" 1>&- 2>&-',
        shell=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 40
    assert read_incidents(tmp_path)[0]["outcome"] == "recovered"


def test_trainer_is_reused_after_a_fit_in_the_same_kernel(tmp_path):
    """A cell is run twice: the callbacks start again, and what they wrote is kept."""
    suite = stability_callbacks()
    for _ in range(2):
        trainer = make_trainer(tmp_path, with_fault(*suite), max_steps=30)
        trainer.fit(Regression(), regression_data())
        assert trainer.global_step == 30
    assert len(read_incidents(tmp_path)) == 2


def test_checkpoint_callback_without_a_folder_or_a_monitor_is_no_obstacle(tmp_path):
    uploads, suite = Uploads(), stability_callbacks()
    trainer = make_trainer(
        tmp_path, with_fault(*suite, uploads), max_steps=40, enable_checkpointing=True
    )
    trainer.fit(Regression(), regression_data())
    assert trainer.global_step == 40
    assert uploads.epochs >= 1
    assert [record["outcome"] for record in read_incidents(tmp_path)] == ["recovered"]


@pytest.mark.parametrize("kind", [Callback, ModelCheckpoint])
def test_mock_of_a_callback_is_no_obstacle(kind, tmp_path):
    """Programs of others are tested with stand-ins, in which Lightning's hooks are mocks."""
    mock = Mock(spec=kind, state_key="mock", **{"state_dict.return_value": {}})
    callbacks = [*stability_callbacks(), mock]
    trainer = make_trainer(tmp_path, callbacks, max_steps=5, enable_checkpointing=True)
    trainer.fit(Regression(), regression_data())
    assert mock.on_train_batch_end.call_count == 5
