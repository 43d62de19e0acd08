"""A logger or a disk that fails ends no fit, is reported once, and has only a gap."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lit_stability import (
    AdaptiveGradientClipping,
    CrashPrediction,
    GradientFlow,
    StabilityCallback,
    read_incidents,
    stability_callbacks,
)
from lit_stability.faults import FaultInjector, NanLoss
from lit_stability.outside import to_each
from tests.conftest import fit, flat

pytestmark = pytest.mark.usefixtures("empty_pictures")


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


def train(root, *loggers):
    callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks()]
    callbacks += [AdaptiveGradientClipping(), CrashPrediction(), GradientFlow()]
    return fit(root, callbacks, logger=[*loggers], log_every_n_steps=1, max_steps=45)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Those of a fit without a logger."""
    return flat(train(tmp_path_factory.mktemp("bare"))[0])


@pytest.mark.parametrize("failing", CALLS)
def test_fit_goes_on_to_the_same_weights_when_a_logger_fails(failing, weights, tmp_path, caplog):
    well = TensorBoardLogger(tmp_path / "well", "", "")
    module, trainer = train(tmp_path / "failing", Failing(failing), well)
    assert trainer.global_step == 45
    found = [r.getMessage() for r in caplog.records if "the server is gone" in r.getMessage()]
    assert 1 <= len(found) <= 3, "once for each kind of value"
    assert torch.equal(flat(module), weights)


OBSTACLES = {
    "incidents.jsonl": "incidents cannot be recorded",
    "incidents": "the folder of an incident was not saved",
    "good": "was not written to",
    "gradient_flow": "a picture of the gradient flow was not written",
}
"""What is in the way of each part that writes files, and what it logs."""


def test_fit_goes_on_to_the_same_weights_when_no_file_can_be_written(tmp_path, caplog):
    def train(name):
        callbacks = [FaultInjector([NanLoss(step=20), NanLoss(step=40)]), *stability_callbacks()]
        return fit(tmp_path / name, [*callbacks, GradientFlow(every_n_steps=50)])

    for name in OBSTACLES:
        path = tmp_path / "failing" / name
        path.mkdir(parents=True) if path.suffix else path.write_text("in the way")
    module, trainer = train("failing")
    assert trainer.global_step == 60
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    for logged in OBSTACLES.values():
        assert sum(logged in line for line in warnings) == 1, logged
    assert torch.equal(flat(module), flat(train("bare")[0]))


def test_record_that_could_not_be_written_for_a_while_is_complete_at_the_end(tmp_path):
    class Repair(StabilityCallback):
        """Makes room on the disk after the first incident."""

        def on_incident_closed(self, trainer, pl_module, incident):
            if record.is_dir():
                record.rmdir()

    record = tmp_path / "incidents.jsonl"
    record.mkdir()
    faults = FaultInjector([NanLoss(step=20), NanLoss(step=40)])
    fit(tmp_path, [faults, *stability_callbacks(), Repair()])
    assert [i["outcome"] for i in read_incidents(tmp_path)] == ["recovered", "recovered"]


class NoHash(Failing):
    """A logger that is compared by its values, and so cannot be in a set."""

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, NoHash)


def test_logger_that_cannot_be_hashed_is_reported_once(caplog):
    logger = NoHash("experiment")
    for _ in range(3):
        assert not to_each([logger], lambda each: 1 / 0)
    assert caplog.text.count("NoHash does not take values of the suite") == 1


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
