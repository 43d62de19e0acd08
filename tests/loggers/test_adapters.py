"""What each logger has of the incidents of a real fit; stubs stand for what is not installed."""

import csv
import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_stability import GradientMonitor, TrainingStopped, stability_callbacks
from lit_stability.faults import BadBatch, FaultInjector, NanLoss
from lit_stability.loggers import writer
from lit_stability.loggers.rows import COLUMNS
from tests.conftest import Regression, fit, flat
from tests.loggers.stubs import CometLogger, MLFlowLogger, WandbLogger

TABLE = "stability/incidents.json"


def suite(*faults, **options):
    callbacks = [*stability_callbacks()]
    callbacks[0] = GradientMonitor(**options)
    return [*([FaultInjector([*faults])] if faults else []), *callbacks]


@pytest.fixture(scope="module")
def loggers(tmp_path_factory):
    """Loggers of a fit through a glitch and a bad batch."""
    root = tmp_path_factory.mktemp("loggers")
    made = {"wandb": WandbLogger(root), "mlflow": MLFlowLogger(root), "comet": CometLogger(root)}
    made["csv"] = CSVLogger(root, "csv", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", SimpleNamespace(Artifact=made["wandb"].artifact))
        callbacks = suite(NanLoss(step=20), BadBatch(step=35), upload_incidents=True)
        fit(root, callbacks, logger=list(made.values()), max_steps=60)
    return made


def rows_of(columns, data):
    assert tuple(columns) == COLUMNS
    return [dict(zip(columns, row, strict=True)) for row in data]


def check(rows):
    found = [(r["id"], r["step"], r["kind"], r["cause"], r["outcome"]) for r in rows]
    assert found == [
        (1, 20, "non-finite loss", "glitch", "recovered"),
        (2, 35, "non-finite loss", "bad batch", "recovered"),
    ]


def test_wandb_has_one_table_an_alert_a_summary_tags_and_the_folders(loggers):
    server, run = loggers["wandb"].server, loggers["wandb"].experiment
    tables = server.of("log_text")
    assert {t["key"] for t in tables} == {"stability/incident_table"}
    assert len(tables) == 2, "the first at once, then one a minute, and one at the end"
    check(rows_of(tables[-1]["columns"], tables[-1]["data"]))
    (alert,) = server.of("alert")
    assert (alert["title"], alert["level"]) == ("Training incident: non-finite loss", "WARN")
    assert alert["text"].startswith("step 20: loss is nan. What to try: ")
    assert server.of("summary")[-1] == {
        "stability/incident_count": 2,
        "stability/causes": "glitch; bad batch",
        "stability/stopped": False,
    }
    assert run.tags == ("mine", "stability: incident")
    assert [a["name"] for a in server.of("__init__")] == ["incident-run1-1", "incident-run1-2"]
    assert [a["local_path"][-10:] for a in server.of("add_dir")] == ["00000020-1", "00000035-2"]
    assert len(server.of("log_artifact")) == 2


def test_numbers_under_a_key_stay_numbers(loggers):
    """A key of W&B has one type: no scalar may have the name of the table."""
    keys = {key for metrics in loggers["wandb"].metrics for key in metrics}
    assert "stability/incidents" in keys
    assert "stability/incident_table" not in keys


def test_mlflow_has_reports_a_table_tags_and_the_folders(loggers):
    server = loggers["mlflow"].server
    texts = {t["artifact_file"]: t["text"] for t in server.of("log_text")}
    assert {*texts} == {"stability/incident_1.md", "stability/incident_2.md", TABLE}
    assert "recovered" in texts["stability/incident_2.md"]
    table = json.loads(texts[TABLE])
    check(rows_of(table["columns"], table["data"]))
    tags = {t["key"]: t["value"] for t in server.of("set_tag")}
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": TABLE, "type": "table"}]
    assert tags["stability.causes"] == "glitch; bad batch"
    paths = [a["artifact_path"] for a in server.of("log_artifacts")]
    assert paths == ["stability/incident_1", "stability/incident_2"]


def test_comet_has_reports_and_one_table(loggers):
    server = loggers["comet"].server
    assert [t["metadata"]["outcome"] for t in server.of("log_text")] == ["open", "recovered"] * 2
    (table,) = server.of("log_table")
    check(rows_of(table["headers"], table["tabular_data"]))
    assert {t["tag"] for t in server.of("add_tag")} == {"stability: incident"}


def test_csv_has_a_file_beside_the_metrics_and_keeps_rows_of_other_runs(loggers, tmp_path):
    logger = CSVLogger(tmp_path, "", "")
    for step in (10, 20):
        fit(tmp_path, suite(NanLoss(step=step)), logger=logger, max_steps=35)
    with (tmp_path / "incidents.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10", "20"]
    folder = loggers["csv"].log_dir
    with open(f"{folder}/incidents.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    check([{**row, "id": int(row["id"]), "step": int(row["step"])} for row in rows])


def test_stop_is_an_urgent_alert_and_a_tag(tmp_path):
    class Constant(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    logger = WandbLogger(tmp_path)
    with pytest.raises(TrainingStopped):
        fit(tmp_path, suite(), Constant, logger=logger)
    alerts = logger.server.of("alert")
    assert [(a["title"], a["level"]) for a in alerts][-1] == ("Training stopped", "ERROR")
    assert "stability: stopped" in logger.experiment.tags
    assert logger.server.of("summary")[-1]["stability/stopped"] is True


def test_fit_goes_on_to_the_same_weights_when_every_call_fails(tmp_path, caplog, monkeypatch):
    def fail():
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(writer, "_SECONDS_AT_END", 0.5)
    kinds = (WandbLogger, MLFlowLogger, CometLogger)
    made = [kind(tmp_path, fail) for kind in kinds]

    def train(name, **options):
        callbacks = suite(NanLoss(step=20), BadBatch(step=35), upload_incidents=True)
        return fit(tmp_path / name, callbacks, **options)

    module, _ = train("failing", logger=made)
    failed = [m for m in caplog.messages if "the server is gone" in m]
    assert len(failed) == len(set(failed)) == len(kinds)
    assert torch.equal(flat(module), flat(train("bare")[0]))


def test_fit_does_not_wait_for_a_server_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SECONDS_AT_END", 0.3)
    for_ever = threading.Event()
    logger = MLFlowLogger(tmp_path, for_ever.wait)
    begin = time.monotonic()
    _, trainer = fit(tmp_path, suite(NanLoss(step=20)), logger=logger)
    assert trainer.global_step == 60
    assert time.monotonic() - begin < 20
    for_ever.set()
