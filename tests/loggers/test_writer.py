import csv

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from lit_stability.loggers.writer import StabilityWriter
from tests.conftest import Regression, fit
from tests.incidents.test_incident import incident

KEYS = {"grad_norm", "learning_rate", "learning_rate_factor", "update_ratio", "incidents"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    loggers = [TensorBoardLogger(root / "tb", "", ""), CSVLogger(root / "csv", "", "")]
    callbacks = [FaultInjector([NanLoss(step=30)]), *stability_callbacks()]
    module = lambda: Regression(scheduler="onecycle")  # noqa: E731
    fit(root, callbacks, module, logger=loggers, log_every_n_steps=5)
    return root


def events_in(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def events(run):
    return events_in(run / "tb")


def test_documented_scalars_are_written_on_the_loggers_steps(run):
    """K5, V4: the keys of the class docstring, every `log_every_n_steps` steps."""
    accumulator = events(run)
    tags = {t for t in accumulator.Tags()["scalars"] if t.startswith("stability/")}
    assert tags == {f"stability/{key}" for key in KEYS}
    steps = [e.step for e in accumulator.Scalars("stability/grad_norm")]
    assert len(steps) == 12
    assert steps == sorted(steps)
    assert all(e.value > 0 for e in accumulator.Scalars("stability/grad_norm"))
    assert [e.value for e in accumulator.Scalars("stability/incidents")][-1] == 1.0


def test_incident_is_written_as_markdown_once_more_when_closed(run):
    """K5: readable without any plugin."""
    accumulator = events(run)
    tag = "stability/incident_1/text_summary"
    assert tag in accumulator.Tags()["tensors"]
    texts = [e.tensor_proto.string_val[0].decode() for e in accumulator.Tensors(tag)]
    assert len(texts) == 2
    assert "step retried" in texts[0]
    assert "recovered" in texts[1]


def test_other_loggers_get_the_scalars_too(run):
    with (run / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["stability/grad_norm"]]
    assert len(rows) == 12


def test_text_of_incidents_ends_at_its_limit_and_the_last_one_is_written(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("lit_stability.loggers.writer.TEXTS", 5000)
    logger = TensorBoardLogger(tmp_path, "", "")
    writer = StabilityWriter([logger])
    for number in range(1, 51):
        writer.write_incident(incident(number, message="m" * 500), [], number)
    last = incident(99)
    last.close("stopped", 99)
    writer.write_incident(last, [], 99)
    logger.experiment.close()
    tags = events_in(tmp_path).Tags()["tensors"]
    assert 1 < len(tags) < 12
    assert "stability/incident_99/text_summary" in tags
    assert caplog.text.count("loggers get no more of it") == 1
