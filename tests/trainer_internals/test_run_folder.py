"""Which folder a run has, and which run a fit belongs to."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lit_stability import LastKnownGood, find_last_good, read_incidents, stability_callbacks
from lit_stability.callbacks import GradientMonitor
from lit_stability.faults import FaultInjector, NanLoss
from lit_stability.trainer_internals import run_directory, why_no_directory
from tests.conftest import Regression, regression_data
from tests.conftest import make_trainer as make


def make_trainer(root, *callbacks, **options):
    """A Trainer of which nobody has set the folder of its records."""
    return make(None, callbacks, **({"default_root_dir": root} | options))


class Named(Logger):
    """As W&B, MLflow and Comet: a folder for all runs, a project and the id of a run."""

    def __init__(self, save_dir, name="project", version="x1"):
        super().__init__()
        self._of = save_dir, name, version

    save_dir = property(lambda self: self._of[0])
    version = property(lambda self: self._of[2])

    @property
    def name(self):
        if self._of[1] is None:
            raise ConnectionError("the server is gone")
        return self._of[1]

    def log_metrics(self, *args, **options):
        pass

    log_hyperparams = log_metrics


LOGGERS = {
    "wandb": lambda root: Named(root / "logs"),
    "no save_dir": lambda root: Named(None),
    "a number": lambda root: Named(root / "logs", version=3),
    "no version": lambda root: Named(root / "logs", version=None),
    "tensorboard": lambda root: TensorBoardLogger(root, "tb"),
    "csv": lambda root: CSVLogger(root, "csv", "a"),
    "two": lambda root: [Named(root, "first"), CSVLogger(root)],
}


@pytest.mark.parametrize("name", LOGGERS)
def test_records_are_beside_the_checkpoints_of_lightning(name, tmp_path):
    saves = ModelCheckpoint()
    logger = LOGGERS[name](tmp_path)
    options = {"logger": logger, "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, saves, max_steps=2, **options)
    trainer.fit(Regression(), regression_data())
    assert run_directory(trainer) / "checkpoints" == Path(saves.best_model_path).parent


def test_logger_that_cannot_say_its_name_leaves_a_folder_of_the_runs_own(tmp_path):
    trainer = make_trainer(tmp_path, logger=Named(tmp_path, name=None))
    found = run_directory(trainer)
    assert found.parent == tmp_path / "stability"
    assert run_directory(trainer) == found


def test_logger_without_save_dir_writes_nothing_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(None, logger=Named(None))
    assert run_directory(trainer) is None
    assert "the logger has no save_dir" in why_no_directory(trainer)


def run(root, *, ckpt_path=None, steps=40, **options):
    suite = stability_callbacks()
    suite[6] = LastKnownGood(every_n_steps=10, confirm_after=3)
    fault = FaultInjector([NanLoss(step=steps - 15)])
    trainer = make_trainer(root, fault, *suite, max_steps=steps, **options)
    trainer.fit(Regression(), regression_data(), ckpt_path=ckpt_path)
    return run_directory(trainer)


def test_runs_without_a_logger_share_nothing_and_a_resumed_one_goes_on_in_its_folder(tmp_path):
    second, first = run(tmp_path, steps=55), run(tmp_path)
    assert first != second
    assert find_last_good(tmp_path).is_relative_to(first), "the newest, though it is shorter"
    assert len({i["run"] for i in read_incidents(tmp_path)}) == 2

    good = find_last_good(first)
    assert run(tmp_path, ckpt_path=good, steps=70) == first
    found = read_incidents(first)
    assert [i["id"] for i in found] == [1, 2]
    assert {i["run"] for i in found} == {first.name}

    elsewhere = run(tmp_path / "fork", ckpt_path=find_last_good(first), steps=100)
    assert {i["run"] for i in read_incidents(elsewhere)} == {elsewhere.name}


def test_run_in_the_folder_of_another_has_an_id_of_its_own_and_a_resumed_one_has_not(tmp_path):
    """As where the version of a logger is fixed."""

    def fit(**options):
        logger = CSVLogger(tmp_path, "", "")
        return run(tmp_path, logger=logger, **options)

    fit()
    fit(ckpt_path=find_last_good(tmp_path), steps=70)
    fit()
    runs = [i["run"] for i in read_incidents(tmp_path)]
    assert runs[0] == runs[1] != runs[2]


def test_monitor_of_another_fit_starts_another_run(tmp_path):
    """One callback object in two Trainers, as in a loop over folds."""
    monitor, ids = GradientMonitor(), []
    for _ in range(2):
        make_trainer(tmp_path, monitor, max_steps=2).fit(Regression(), regression_data())
        ids.append(monitor.run_id)
    assert ids[0] != ids[1]
