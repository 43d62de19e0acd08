"""The run list tells whether a run goes on, and how it ended."""

from contextlib import nullcontext

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_stability import GradientMonitor, StabilityCallback, redaction
from lit_stability.faults import FaultInjector, NanLoss
from lit_stability.incidents import TrainingStopped
from tests.conftest import fit, regression_data
from tests.incidents.test_console_lines import spike
from tests.tensorboard.test_plugin import ask, plugin_on


class Speaks(StabilityCallback):
    """Adds evidence with a password in it."""

    def on_incident(self, trainer, pl_module, incident):
        incident.note("a cause of the user", "401 for hunter2-secret")


class EndsIn(Callback):
    """Raises at the eighth batch, after it has noted what the run list says then."""

    def __init__(self, root, exception):
        self.root, self.exception, self.seen = root, exception, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 7:
            (run,) = ask(plugin_on(self.root), "runs")[1]
            self.seen = run["status"]["state"]
            if self.exception is not None:
                raise self.exception


def test_values_of_the_environment_are_replaced_in_incidents(tmp_path, monkeypatch):
    """A user's own detector or exception may have put them there."""
    monkeypatch.setattr(redaction, "_expressions", {})
    redaction.keep_out({"hunter2-secret": "${oc.env:PASSWORD}"})
    options = {"logger": TensorBoardLogger(tmp_path, "run", ""), "max_steps": 12}
    callbacks = [FaultInjector([NanLoss(step=6)]), GradientMonitor(), Speaks()]
    fit(tmp_path, callbacks, None, regression_data(12), **options)
    (incident,) = ask(plugin_on(tmp_path), "incidents?run=run")[1]
    assert incident["evidence"] == ["401 for ${oc.env:PASSWORD}"]


@pytest.mark.parametrize(
    ("exception", "state"),
    [
        (None, "finished"),
        (TrainingStopped("over", spike()), "stopped"),
        (RuntimeError("over"), "failed"),
        (SystemExit(3), "interrupted"),
    ],
)
def test_status_of_a_run_says_how_it_ended(tmp_path, exception, state):
    ends = EndsIn(tmp_path, exception)
    logger = TensorBoardLogger(tmp_path, "run", "")
    options = {"logger": logger, "log_every_n_steps": 1, "max_steps": 10}
    with nullcontext() if exception is None else pytest.raises(type(exception)):
        fit(tmp_path, [GradientMonitor(), ends], None, regression_data(10), **options)
    (run,) = ask(plugin_on(tmp_path), "runs")[1]
    assert ends.seen == "running"
    assert run["status"]["state"] == state
    assert run["status"]["step"] == (10 if exception is None else 7)
    assert run["problem"] is None
