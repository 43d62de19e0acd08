"""What W&B and MLflow themselves have of the incidents of a fit: `make test-loggers`.

Skipped where they are not installed, as in CI, where stubs made from them stand in.
"""

import importlib.util
import json
import struct
import time
from itertools import pairwise
from pathlib import Path

import pytest
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from lit_stability import GradientMonitor, read_incidents, stability_callbacks
from lit_stability.checks.metric_log import find_logs
from lit_stability.faults import BadBatch, FaultInjector, NanLoss
from lit_stability.loggers.rows import COLUMNS
from tests.conftest import Regression, regression_data
from tests.conftest import make_trainer as make
from tests.loggers.record import CALLS, FILE, recorded

# They give warnings of their own, of which nothing follows for us.
pytestmark = pytest.mark.filterwarnings("default")


def need(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )


def fit(root, logger):
    suite = stability_callbacks()
    suite[0] = GradientMonitor(upload_incidents=True)
    faults = FaultInjector([NanLoss(step=20), BadBatch(step=35)])
    trainer = make(None, [faults, *suite], logger=logger, default_root_dir=root)
    trainer.fit(Regression(), regression_data())


def records_of(file):
    """The records in the file of an offline run of W&B, which are framed as in LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@need("wandb")
def test_wandb_offline_has_table_alert_summary_tags_and_folders(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="p", offline=True, save_dir=tmp_path)
    fit(tmp_path, logger)
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for record in records_of(file):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    assert [a.title for a in found["alert"]] == ["Training incident: non-finite loss"]
    assert "stability: incident" in found["run"][-1].tags
    summary = {i.key: i.value_json for s in found["summary"] for i in s.update}
    assert summary["stability/incident_count"] == "2"
    folders = [a.name for a in found["artifact"] if a.type == "incident"]
    assert folders == [f"incident-{logger.version}-{number}" for number in (1, 2)]
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.json"))
    rows = [json.loads(table.read_text()) for table in tables]
    assert max(len(table["data"]) for table in rows) == 2
    assert rows[0]["columns"] == list(COLUMNS)
    assert len(read_incidents(tmp_path / "p" / logger.version)) == 2


@need("wandb")
def test_doctor_reads_what_wandb_has_written_and_how_the_run_ended(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="p", mode="offline", dir=tmp_path)
    losses = [2.0, 1.5, 1e-30, float("nan"), float("inf"), 10**12]
    for step, loss in enumerate(losses):
        wide = {f"metric_{i}": "x" * 9000 for i in range(9)}  # rows that span blocks of the file
        run.log({"train": {"loss": loss}, "histogram": wandb.Histogram([1, 2]), **wide}, step)
    run.finish(exit_code=3)
    ((reader, files),) = find_logs(tmp_path)
    for _ in range(100):  # another process writes the last records, sometimes after `finish`
        log = reader.read(files)
        if log.complete:
            break
        time.sleep(0.1)
    series = log.series["train.loss"]
    assert list(map(str, series.values)) == [str(float(loss)) for loss in losses]
    assert list(series.steps) == [0, 1, 2, 3, 4, 5]
    assert all(later >= before for before, later in pairwise(series.times))
    assert (log.complete, log.exit_code, log.problems) == (True, 3, [])


@need("mlflow")
@pytest.mark.parametrize("store", ["files", "sqlite"])
def test_mlflow_has_reports_table_tags_and_folders_and_its_store_is_whole(
    store, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlruns" if store == "files" else f"sqlite:///{tmp_path}/mlflow.db"
    place = None if store == "files" else str(tmp_path / "artifacts")
    for _ in range(2):
        logger = MLFlowLogger("mine", tracking_uri=uri, artifact_location=place)
        fit(tmp_path, logger)
    client, run = logger.experiment, logger.run_id
    names = {file.path for file in client.list_artifacts(run, "stability")}
    assert {"stability/incident_1.md", "stability/incident_2", "stability/incidents.json"} <= names
    tags = client.get_run(run).data.tags
    assert tags["stability.causes"] == "glitch; bad batch"
    (table,) = Path(client.download_artifacts(run, "stability")).glob("incidents.json")
    assert len(json.loads(table.read_text())["data"]) == 2
    if importlib.util.find_spec("pandas") is not None:
        experiment = logger.experiment_id
        loaded = client.load_table(experiment, "stability/incidents.json", run_ids=[run])
        assert list(loaded["outcome"]) == ["recovered", "recovered"]
    assert {e.name for e in client.search_experiments()} == {"Default", "mine"}
    runs = [i["run"] for i in read_incidents(tmp_path)]
    assert len(runs) == 4
    assert len({*runs}) == 2


@pytest.mark.parametrize("package", CALLS)
def test_recorded_signatures_are_those_of_the_package(package):
    for path in CALLS[package]:
        pytest.importorskip(path.split(".")[0], exc_type=ImportError)
    assert json.loads(FILE.read_text())[package]["calls"] == recorded(package)
