"""`fit` with several values, `--strict`, and Ctrl-C: what is printed, written and returned."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_stability.cli import sweep
from lit_stability.cli.config import compose
from lit_stability.cli.experiments.process import Ended
from lit_stability.cli.fit import fit
from lit_stability.cli.main import main
from lit_stability.cli.sweep import combinations, values_of
from tests.cli.test_main import CONFIG, ROOT, cwd  # noqa: F401
from tests.programs import Program

ENDED = Ended(code=0, started=0.0, seconds=1.0)
LOGGING = "model._target_=cli_targets.Logging"
EXPECTING = """
compose: [small]
model: {_target_: cli_targets.Logging}
expect: {metrics: {loss: "< 0"}}
"""


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a=1,2", ["a=1", "a=2"]),
        ("a=[1,2],[3]", ["a=[1,2]", "a=[3]"]),
        ("a={x: 1, y: 2}", ["a={x: 1, y: 2}"]),
        ("a='1,2',3", ["a='1,2'", "a=3"]),
        ('a="x, y"', ['a="x, y"']),
        ("a=it's,2", ["a=it's", "a=2"]),
        ("a=[1,2", ["a=[1,2"]),
        ("a=", ["a="]),
        ("a=1,", ["a=1", "a="]),
    ],
)
def test_commas_outside_of_brackets_and_quotes_separate_values(override, values):
    assert values_of(override) == values


def test_every_combination_is_run_and_the_last_key_varies_fastest():
    found = combinations(["a=1,2", "b=x", "c=3,4"])
    expected = ["a=1 b=x c=3", "a=1 b=x c=4", "a=2 b=x c=3", "a=2 b=x c=4"]
    assert [" ".join(each) for each in found] == expected


def test_sweep_runs_each_value_in_its_folder_and_prints_a_table(cwd, capsys, monkeypatch):  # noqa: F811
    """One run that fails does not end the others."""
    monkeypatch.setattr(subprocess, "Popen", Program)
    assert (
        main(["fit", "-c", "small", "--name", "s", "model.fail=false,true", "seed=3", LOGGING]) == 1
    )
    printed = capsys.readouterr().out
    folder = Path("runs/small/s")
    rows = json.loads((folder / "sweep.json").read_text())["runs"]
    assert [row["values"] for row in rows] == [{"model.fail": "false"}, {"model.fail": "true"}]
    assert (rows[0]["ends"], rows[0]["code"]) == ("finished", 0)
    assert (rows[1]["ends"], rows[1]["code"]) == ("exit code 1: RuntimeError: crashed", 1)
    assert {each.name for each in folder.iterdir()} == {
        "model.fail=false",
        "model.fail=true",
        "sweep.json",
    }
    assert compose([folder / "model.fail=false/config.yaml"]).seed == 3
    (head,) = (line for line in printed.splitlines() if line.startswith("model.fail  ended"))
    assert head.split() == ["model.fail", "ended", "incidents", "loss", "time"]
    assert main(["fit", "-c", "small", "--name", "s", "model.fail=false,true"]) == 2
    assert "s/model.fail=false: has an earlier run; add --overwrite" in capsys.readouterr().err


def test_values_that_no_folder_can_be_named_after_have_numbers(cwd, monkeypatch):  # noqa: F811
    """Equal values are one run; in an interactive job of SLURM a sweep is started as anywhere."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    started = []
    monkeypatch.setattr(sweep, "fit_in_process", lambda *given: started.append(given) or ENDED)
    assert main(["fit", "-c", "small", "--name", "s", "about='a/b','a_b','a_b'"]) == 0
    assert [folder.name for _, folder in started] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "last", "seed=1,2"], "--resume: goes with one run"),
        (["--print-config", "seed=1,2"], "--print-config: goes with one run"),
        (["run_dir=a,b"], "run_dir: give one folder"),
        (["seed=1,2", "seed=3"], "seed: is given twice"),
        (["seed=1,2", "--strict=x"], "ignored explicit argument"),
        (["seed=1,"], "seed=: no value"),
    ],
)
def test_options_that_do_not_go_with_several_runs_are_refused(arguments, message, cwd, capsys):  # noqa: F811
    try:
        code = main(["fit", "-c", "small", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_strict_makes_an_unmet_expectation_an_exit_code(cwd, capsys):  # noqa: F811
    (cwd / "configs/expecting.yaml").write_text(EXPECTING)
    assert main(["fit", "-c", "expecting"]) == 0
    assert "expectation NOT met" in capsys.readouterr().out
    assert main(["fit", "-c", "expecting", "--strict"]) == 4
    met = "expect.metrics.loss='< 1e9'"
    assert main(["fit", "-c", "expecting", "--strict", met]) == 0
    assert main(["fit", "-c", "expecting", "--strict", met, "expect.ends=stopped"]) == 4
    assert main(["fit", "-c", "small", "--strict"]) == 2
    assert "--strict: the config has no `expect`" in capsys.readouterr().err


def test_strict_run_that_fails_as_expected_returns_0_and_shows_why(cwd, capsys):  # noqa: F811
    (cwd / "configs/expecting.yaml").write_text("compose: [small]\nexpect: {ends: stopped}")
    broken = ["model._target_=cli_targets.Broken", "trainer.limit_train_batches=1.0"]
    stops = "callbacks.preflight={_target_: lit_stability.Preflight, on_error: stop}"
    assert main(["fit", "-c", "expecting", "--strict", *broken, stops]) == 0
    assert "PreflightError" in capsys.readouterr().err


SLOW = """
compose: [small]
trainer: {max_steps: -1, max_epochs: -1, limit_train_batches: 1.0}
callbacks:
  monitor: {_target_: lit_stability.GradientMonitor}
  rollback: {_target_: lit_stability.AutoRollback}
  good: {_target_: lit_stability.LastKnownGood}
"""


def test_ctrl_c_exits_with_130_saves_and_prints_the_command_that_goes_on(cwd):  # noqa: F811
    (cwd / "configs/slow.yaml").write_text(SLOW)
    command = [sys.executable, "-m", "lit_stability.cli.main", "fit", "-c", "slow"]
    with Path("errors").open("w") as errors:
        process = Program([*command, "run_dir=runs/x"], stderr=errors)
    deadline = time.monotonic() + 120
    while not [*Path("runs/x").glob("good/*.ckpt")] and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)  # some hundred steps
    process.send_signal(signal.SIGINT)
    try:
        code = process.wait(timeout=120)
    finally:
        process.kill()
    error = Path("errors").read_text()
    assert code == 130, error
    assert error.rstrip().endswith("interrupted; go on with: lit-stability resume runs/x")
    assert json.loads(Path("runs/x/outcome.json").read_text())["ends"] == "interrupted"
    assert main(["resume", "runs/x", "trainer.max_steps=1"]) == 0
    (step,) = {int(f.stem.partition("=")[2]) for f in Path("runs/x/good").glob("*.ckpt")} - {0}
    assert step >= 20


def test_progress_bar_without_a_bound_on_epochs_shows_none(cwd, monkeypatch):  # noqa: F811
    """Lightning's bar showed "Epoch 0/-2" where only the steps are bounded."""
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(cwd))
    bar = ["trainer.enable_progress_bar=true", "callbacks.bar._target_=lightning.pytorch.callbacks"]
    bar[1] += ".RichProgressBar"
    trainer = fit(compose(["small"], bar)).trainer
    assert trainer.progress_bar_callback._get_train_description(0).strip() == "Epoch 0"
    trainer = fit(compose(["small"], [*bar, "trainer.max_epochs=3"])).trainer
    assert trainer.progress_bar_callback._get_train_description(0).strip() == "Epoch 0/2"
