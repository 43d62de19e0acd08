"""`lit-stability doctor` on the metric logs of runs that never had the suite."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from lit_stability.cli.main import main
from tests.checks.checkpoint.examples import checkpoint_of
from tests.checks.metric_log.test_golden_logs import FOLDER
from tests.conftest import Regression


def doctor(*arguments):
    return main(["doctor", *map(str, arguments)])


@pytest.fixture
def runs(tmp_path):
    """A folder of two runs of Lightning: a healthy one and one with NaN, and a table of data."""
    for version, name in enumerate(("healthy", "nan")):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        folder.mkdir(parents=True)
        shutil.copy(FOLDER / f"{name}.csv", folder / "metrics.csv")
    (tmp_path / "prices.csv").write_text("step,loss\n0,NaN\n")
    return tmp_path


def test_log_with_an_error_exits_with_1_and_says_what_when_and_why(capsys):
    assert doctor(FOLDER / "nan.csv") == 1
    printed = capsys.readouterr().out
    assert "a log of CSV: 75 points of the loss, steps 3 to 299" in printed
    assert "used: loss train_loss_step; validation loss val_loss" in printed
    assert "error: non-finite loss at step 203 [loss]\n  where: train_loss_step" in printed
    assert "it was 0.1224 at step 199" in printed
    assert "cause, likely: bad batch" in printed
    assert "found: 1 error" in printed
    assert "grad_norm " in printed


def test_healthy_log_exits_with_0(capsys):
    assert doctor(FOLDER / "healthy.csv") == 0
    assert "nothing found" in capsys.readouterr().out


def test_folder_of_runs_is_a_report_for_each_and_one_error_is_enough(runs, capsys):
    assert doctor(runs) == 1
    printed = capsys.readouterr().out
    assert printed.count("a log of CSV") == 2
    assert "prices.csv" not in printed
    bad = runs / "lightning_logs" / "version_1" / "metrics.csv"
    assert printed.endswith(f"2 logs, 1 with errors: {bad}\n")
    assert doctor(runs / "lightning_logs" / "version_0") == 0


def test_json_is_printed_alone_and_written_the_same(runs, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert doctor(runs, "--json", "--out", out) == 1
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == printed
    healthy, bad = printed["logs"]
    assert (healthy["schema"], healthy["healthy"], bad["healthy"]) == (1, True, False)
    assert bad["used"]["loss"] == ["train_loss_step"]
    (finding,) = bad["findings"]
    assert (finding["severity"], finding["step"], finding["until"]) == ("error", 203, None)
    assert finding["causes"][0]["cause"] == "bad batch"
    loss = next(s for s in bad["series"] if s["name"] == "train_loss_step")
    assert (loss["last"], loss["non_finite"]) == ("nan", 25)


def test_json_of_a_checkpoint_is_printed_alone_too(tmp_path, capsys):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert doctor(tmp_path / "a.pt", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["healthy"] is True


def test_known_good_checkpoint_of_a_folder_comes_before_its_logs(tmp_path, capsys):
    checkpoint_of(tmp_path, Regression)
    shutil.copy(FOLDER / "nan.csv", tmp_path / "metrics.csv")
    assert doctor(tmp_path) == 0
    assert "the last known good of" in capsys.readouterr().out
    assert doctor(tmp_path, "--loss", "train_loss_step") == 1
    assert "a log of CSV" in capsys.readouterr().out


def test_run_without_a_loss_is_named_beside_the_others(runs, capsys):
    (runs / "metrics.csv").write_text("step,accuracy\n0,0.5\n")
    assert doctor(runs) == 1
    reason = "not examined: CSV: no metric is named like a training loss; choose one with --loss"
    assert f"{runs / 'metrics.csv'}: {reason} NAME: accuracy" in capsys.readouterr().out


REFUSED = {
    "no loss": (["accuracy.csv"], "no metric is named like a training loss; choose one with"),
    "unknown loss": (["nan.csv", "--loss", "los"], "has no metric 'los'; it has epoch, grad_norm"),
    "loss of a checkpoint": (["a.pt", "--loss", "loss"], "has no metric log, so --loss has no use"),
    "two logs": (["nan.csv", "nan.csv"], "metric logs are not compared; give one path"),
    "plot": (["nan.csv", "--plot", "p.png"], "draws checkpoints only, and these are metric logs"),
    "empty folder": (["empty"], "nor has it a metric log: event files of TensorBoard, metrics.csv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_examined_is_a_message_and_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOLDER / "nan.csv", "nan.csv")
    (tmp_path / "accuracy.csv").write_text("step,accuracy\n0,0.5\n")
    (tmp_path / "empty").mkdir()
    torch.save({"w": torch.ones(2)}, "a.pt")
    arguments, message = REFUSED[case]
    assert doctor(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_names_in_a_log_are_printed_without_control_characters(tmp_path, capsys):
    (tmp_path / "m.csv").write_text("step,loss\x1b[31m,loss\n0,NaN,NaN\n", newline="")
    assert doctor(tmp_path / "m.csv", "--loss", "loss\x1b[31m") == 1
    printed = capsys.readouterr().out
    assert [c for c in printed if not c.isprintable() and c != "\n"] == []


def test_logs_are_examined_without_loading_torch():
    code = (
        "import sys; from lit_stability.cli.main import main\n"
        f"code = main(['doctor', {str(FOLDER / 'nan.csv')!r}])\n"
        "sys.exit(code if 'torch' not in sys.modules else 'torch was loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
