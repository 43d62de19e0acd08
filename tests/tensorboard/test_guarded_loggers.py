"""A logger that fails on a value of the suite ends no fit."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lit_stability import (
    AdaptiveGradientClipping,
    CrashPrediction,
    GradientFlow,
    stability_callbacks,
)
from lit_stability.faults import FaultInjector, NanLoss
from lit_stability.tensorboard.guarded_loggers import to_each
from tests.conftest import fit, flat


class Experiment:
    """An experiment of which one method raises."""

    def __init__(self, failing):
        self._failing, self.taken = failing, []

    def _take(self, name):
        if name == self._failing:
            raise ConnectionError("the server is gone")
        self.taken.append(name)

    def add_text(self, *args):
        self._take("add_text")

    def add_image(self, *args, **options):
        self._take("add_image")

    def flush(self):
        self._take("flush")


class Failing(Logger):
    """Fails on values of the suite from its tenth on; with Lightning's own it is well."""

    def __init__(self, failing):
        super().__init__()
        self.failing, self.calls, self._experiment = failing, 0, Experiment(failing)

    name, version = "failing", "0"

    def log_hyperparams(self, *args, **options):
        pass

    def log_metrics(self, metrics, step=None):
        own = any(key.startswith("stability/") for key in metrics)
        self.calls += own
        if self.failing == "log_metrics" and own and self.calls > 9:
            raise ConnectionError("the server is gone")

    @property
    def experiment(self):
        if self.failing == "experiment" and self.calls > 9:
            raise ConnectionError("the server is gone")
        return self._experiment


CALLS = ("log_metrics", "experiment", "add_text", "add_image", "flush")


@pytest.mark.parametrize("failing", CALLS)
def test_fit_goes_on_to_the_same_weights_when_a_logger_fails(failing, tmp_path, caplog):
    def train(name, *loggers):
        callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks()]
        callbacks += [AdaptiveGradientClipping(), CrashPrediction(), GradientFlow()]
        return fit(tmp_path / name, callbacks, logger=[*loggers], log_every_n_steps=1)

    well = TensorBoardLogger(tmp_path / "well", "", "")
    module, trainer = train("failing", Failing(failing), well)
    assert trainer.global_step == 60
    found = [r.getMessage() for r in caplog.records if "the server is gone" in r.getMessage()]
    assert 1 <= len(found) <= 3, "once for each place that writes"
    assert torch.equal(flat(module), flat(train("bare")[0]))


def test_logger_that_recovers_has_only_a_gap():
    taken = []

    class Logger:
        down = True

        def write(self, value):
            if self.down:
                raise OSError("no network")
            taken.append(value)

    logger = Logger()
    assert not to_each([logger], lambda each: each.write(1))
    logger.down = False
    assert to_each([logger], lambda each: each.write(2))
    assert taken == [2]
