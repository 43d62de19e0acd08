"""`lit-stability experiments`, as a user types it, on two experiments of a second."""

import json
import subprocess
import sys

import pytest

from lit_stability.cli.experiments import Outcome, command
from lit_stability.cli.experiments.judgement import Verdict
from lit_stability.cli.experiments.running import Result
from lit_stability.cli.experiments.table import as_text
from lit_stability.cli.fit import check_options, compose, fit, resolve
from lit_stability.cli.main import main
from lit_stability.errors import ConfigError
from tests.programs import Program

MODULE = """
from lightning.pytorch.demos.boring_classes import BoringModel


class Logs(BoringModel):
    def __init__(self, value: float = 1.0, fail: bool = False) -> None:
        super().__init__()
        self.value, self.fail = value, fail

    def training_step(self, batch, batch_idx):
        self.log("value", self.value)
        if self.fail:
            raise RuntimeError("crashed")
        return super().training_step(batch, batch_idx)
"""
BASE = """
seed: 0
model: {_target_: experiment_targets.Logs}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
logger: null
"""
GOOD = """
about: logs a one
compose: [parts/base]
expect: {metrics: {value: "== 1"}}
callbacks: {monitor: {_target_: lit_stability.GradientMonitor}}
"""
BAD = """
about: claims to log a two
compose: [parts/base]
expect: {metrics: {value: "> 1.5"}, incidents: []}
"""


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """A project of two experiments, of which one does not show what it states."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "experiment_targets", raising=False)
    (tmp_path / "experiment_targets.py").write_text(MODULE)
    (tmp_path / "configs/parts").mkdir(parents=True)
    (tmp_path / "configs/parts/base.yaml").write_text(BASE)
    (tmp_path / "configs/bad.yaml").write_text(BAD)
    (tmp_path / "configs/good.yaml").write_text(GOOD)
    (tmp_path / "configs/plain.yaml").write_text("about: a part\n" + BASE)
    return tmp_path


def test_experiments_without_a_name_lists_them_with_a_line_each(cwd, capsys):
    """K5."""
    assert main(["experiments"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bad    claims to log a two",
        "good   logs a one",
        "plain  a part (has no `expect`)",
    ]
    assert not (cwd / "runs").exists()


def test_experiments_run_one_after_another_and_the_bad_one_stops_no_other(cwd, capsys, monkeypatch):
    """K5."""
    monkeypatch.setattr(subprocess, "Popen", Program)
    assert main(["experiments", "--all", "--out", "out"]) == 1
    printed = capsys.readouterr().out
    assert "expectation NOT met: value > 1.5, observed 1 (" in printed
    assert "1 of 2 as expected; not: bad" in printed
    table = json.loads((cwd / "out/experiments.json").read_text())
    good, bad = (next(r for r in table["experiments"] if r["name"] == n) for n in ("good", "bad"))
    assert (good["met"], bad["met"], good["incidents"]) == (True, False, [])
    assert [(v["expected"], v["observed"], v["met"]) for v in bad["verdicts"]] == [
        ("finished", "finished", True),
        ("value > 1.5", "1", False),
        ("no incident", "none", True),
    ]
    assert "| good | logs a one | ok: finished<br>ok: value == 1 |" in (
        (cwd / "out/experiments.md").read_text()
    )
    assert "expectation met: finished, value == 1" in (cwd / "out/good/output.txt").read_text()
    assert Outcome.read(cwd / "out/good").ending.ends == "finished"


def test_experiments_take_overrides_and_tell_a_config_that_does_not_run(cwd, capsys):
    assert main(["experiments", "good", "model.value=x"]) == 1
    printed = capsys.readouterr().out
    assert "observed exit code 2: lit-stability: model.value='x': expected float" in printed
    assert "0 of 1 as expected; not: good" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["god"], "god: no such experiment in configs/; did you mean good?"),
        (["plain"], "plain: has no `expect`"),
        (["model.value=2"], "model.value=2: no experiment to override; name one, or use --all"),
        (["good", "expect.metric={}"], "expect.metric={}: unknown option of"),
        (["good", "expect.ends=ended"], "good: expect.ends='ended': expected one of 'finished'"),
        (["good", "expect.metrics.value=1"], "expect.metrics.value=1: expected str, got int"),
        (["good", "expect.metrics.value=one"], "good: expect: metrics.value: 'one' is not a comp"),
    ],
)
def test_experiments_that_cannot_be_judged_are_refused_before_any_runs(
    arguments, message, cwd, capsys
):
    """Invariant 10."""
    assert main(["experiments", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (cwd / "runs").exists()


def test_expectation_is_checked_by_a_fit_as_well(cwd):
    with pytest.raises(
        ConfigError, match=r"expect: Expectation cannot be built: metrics\.value: 'one'"
    ):
        check_options(resolve(compose(["good"], ["expect.metrics.value=one"])))


def test_about_and_expect_are_not_handed_on_to_what_composes_them(cwd):
    (cwd / "configs/other.yaml").write_text("compose: [good]")
    assert {"about", "expect"} & set(compose(["other"])) == set()
    assert compose(["good"]).expect.metrics.value == "== 1"


def test_fit_that_fails_leaves_its_outcome_and_says_what_was_expected(cwd, capsys):
    with pytest.raises(RuntimeError, match="crashed"):
        fit(compose(["good"], ["model.fail=true"]))
    assert "expectation NOT met: finished, observed failed: RuntimeError: crashed" in (
        capsys.readouterr().out
    )
    outcome = Outcome.read(cwd / "runs/good")
    assert (outcome.ending.ends, outcome.ending.why) == ("failed", "RuntimeError: crashed")


def result(name="bad", **fields):
    seen = Verdict("finished", "finished", True)
    values = {"about": "", "verdicts": (seen,), "incidents": (), "seconds": 1.0, "run_dir": ""}
    return Result(name=name, **{**values, **fields})


def test_experiments_interrupted_leave_the_table_of_what_has_run(cwd, capsys, monkeypatch):
    def run(experiment):
        if experiment.name == "good":
            raise KeyboardInterrupt
        return result(experiment.name)

    monkeypatch.setattr(command, "run", run)
    assert main(["experiments", "--all"]) == 1
    assert "interrupted after 1 of 2" in capsys.readouterr().out
    table = json.loads((cwd / "runs/experiments.json").read_text())
    assert [each["name"] for each in table["experiments"]] == ["bad"]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_table_keeps_to_the_width_of_its_terminal(width):
    long = result(
        "translation_with_a_rather_long_name_of_its_own",
        verdicts=(Verdict("incidents: " + "a kind, " * 20, "word " * 30, False),),
        incidents=({"kind": "non-finite loss", "cause": "c " * 40, "outcome": "recovered"},) * 2,
        seconds=12345.0,
    )
    lines = as_text([long], width).splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert "NO" in lines[2]
