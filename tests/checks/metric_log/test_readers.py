"""What the readers make of unusual, damaged and truncated files."""

import gzip
import json
import math

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lit_stability.checks.metric_log import examine_log, find_logs
from lit_stability.checks.metric_log.readers import reader_of
from tests.checks.metric_log.test_golden_logs import FOLDER


def read(file):
    return reader_of(file).read([file])


def points(series):
    return list(zip(series.steps, series.values, strict=True))


def test_csv_with_sparse_columns_nan_as_text_and_a_truncated_row(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,lr-AdamW,step,train_loss\n0,0.1,0,\n0,,0,2.5\n,,1,NaN\n,,2,inf\n0,0.1")
    log = read(file)
    assert points(log.series["lr-AdamW"]) == [(0, 0.1)]
    assert list(log.series["train_loss"].steps) == [0, 1, 2]
    assert math.isnan(log.series["train_loss"].values[1])
    assert log.series["train_loss"].values[2] == math.inf
    assert log.problems == ["1 rows have no step and are ignored"]


def test_csv_of_another_logger_has_its_own_names_for_step_and_time(tmp_path):
    file = tmp_path / "export.csv"
    file.write_text("Wall time,Step,loss\n1700000000.5,10,2.0\n1700000001.5,20,1.0\n")
    series = read(file).series["loss"]
    assert (points(series), series.times[0]) == ([(10, 2.0), (20, 1.0)], 1700000000.5)


def test_rows_of_hugging_face_are_training_evaluation_and_summary(tmp_path):
    rows = [
        {"loss": "NaN", "grad_norm": 1.5, "learning_rate": 1e-4, "step": 10, "epoch": 0.1},
        {"eval_loss": 2.0, "eval_runtime": 3.0, "step": 10},
        {"train_loss": 2.5, "train_runtime": 9.0, "step": 10},
    ]
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"global_step": 10, "max_steps": 50, "log_history": rows}))
    log = read(file)
    assert math.isnan(log.series["loss"].values[0])
    assert points(log.series["eval_loss"]) == [(10, 2.0)]
    assert "train_loss" not in log.series
    assert (log.complete, log.planned_steps) == (True, 50)


def test_newest_state_of_the_checkpoints_of_a_run_is_read(tmp_path):
    for step in (500, 1000, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"log_history": []}')
    ((_, files),) = find_logs(tmp_path)
    assert files == [tmp_path / "checkpoint-1000" / "trainer_state.json"]


def test_event_files_of_one_folder_are_one_run_and_a_restart_replaces_steps(tmp_path):
    for start, value in ((0, 2.0), (6, 1.0)):
        writer = SummaryWriter(tmp_path, filename_suffix=f".{start}")
        for step in range(start, start + 10):
            writer.add_scalar("loss", value, step, new_style=start > 0)
        writer.add_text("notes", "no metric", 0)
        writer.add_histogram("weights", torch.ones(2), 0)
        writer.close()
    ((reader, files),) = find_logs(tmp_path)
    log = reader.read(files)
    assert set(log.series) == {"loss"}
    assert len(log.series["loss"]) == 20
    kept = log.series["loss"].in_force()
    assert points(kept) == [(i, 2.0) for i in range(6)] + [(i, 1.0) for i in range(6, 16)]


@pytest.mark.parametrize(
    ("name", "least"),
    [("nan.tfevents", 30), ("nan.trainer_state.json", 30), ("nan.wandb.gz", 30), ("nan.csv", 30)],
)
def test_of_a_truncated_file_what_comes_before_is_examined(name, least, tmp_path):
    content = (FOLDER / name).read_bytes()
    content = gzip.decompress(content) if name.endswith(".gz") else content
    file = tmp_path / name.removesuffix(".gz")
    file.write_bytes(content[: len(content) * 6 // 10])
    log = read(file)
    report = examine_log(log)
    assert least <= report.points < 75
    assert report.healthy
    if not name.endswith(".csv"):  # a table that ends in a row is like one of a shorter run
        assert "truncated" in report.problems[0]


@pytest.mark.parametrize("name", ["nan.tfevents", "nan.wandb.gz"])
def test_flipped_bit_ends_the_reading_with_the_place_of_the_damage(name, tmp_path):
    content = (FOLDER / name).read_bytes()
    content = bytearray(gzip.decompress(content) if name.endswith(".gz") else content)
    content[len(content) // 2] ^= 4
    file = tmp_path / name.removesuffix(".gz")
    file.write_bytes(content)
    log = read(file)
    (problem,) = log.problems
    assert "damaged after byte" in problem
    assert "wrong checksum" in problem
    assert log.series


@pytest.mark.parametrize("name", ["a.tfevents.1", "run-1.wandb", "trainer_state.json", "m.csv"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"hello\n", b"[1, 2]", bytes(range(256))])
def test_file_of_anything_is_read_without_an_exception(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name).series == {}
