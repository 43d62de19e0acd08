"""What version 0.1.0 wrote to disk is still read: records, callback states, good checkpoints.

The files in `tests/data/written_by_0_1_0` come from a run of `Regression` with the default suite,
`AdaptiveGradientClipping`, `CrashPrediction` and `GradientFlow`: a NaN in the loss at step 30, a
learning rate x1000 from step 70 on, a NaN weight at step 90, an exception at step 150.
"""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from lit_stability import (
    AdaptiveGradientClipping,
    CrashPrediction,
    GradientFlow,
    find_last_good,
    read_incidents,
    stability_callbacks,
)
from lit_stability.checks.checkpoint import examine, format_report
from lit_stability.training_state.good_checkpoints import RunEnd
from tests.conftest import Regression, make_trainer, regression_data

# Written with lightning 2.6.6; an older one that is installed says so.
pytestmark = pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")

WRITTEN = Path(__file__).parent / "data" / "written_by_0_1_0"
STEP = 131
"""At which the good checkpoint was taken."""


@pytest.fixture
def run(tmp_path):
    """A copy of the run, since a resume writes into its folder."""
    shutil.copytree(WRITTEN, tmp_path / "run")
    return tmp_path / "run"


def suite():
    further = [AdaptiveGradientClipping(), CrashPrediction(), GradientFlow(every_n_steps=1000)]
    return [*stability_callbacks(), *further]


def named(callbacks, name):
    return next(each for each in callbacks if type(each).__name__ == name)


def test_record_of_incidents_is_read():
    found = read_incidents(WRITTEN)
    assert [(i["step"], i["kind"], i["outcome"]) for i in found] == [
        (30, "non-finite loss", "recovered"),
        (70, "learning-rate jump", "recovered"),
        (90, "non-finite weight", "recovered"),
    ]
    assert [i["cause"] for i in found][1:] == [
        "learning rate jumped",
        "weights damaged from outside",
    ]
    assert all(i["strikes"] == 1 and i["hypotheses"][0]["points"] >= 2 for i in found)


def test_end_of_the_run_is_read_with_its_failure():
    path = find_last_good(WRITTEN)
    assert path is not None
    assert path.name == f"step={STEP:08}.ckpt"
    end = RunEnd.read(path.parent)
    assert end is not None
    assert (end.state, end.step, end.failures_behind(path)) == ("failed", 150, 1)


def test_good_checkpoint_is_resumed_and_verified(run, caplog):
    """Every callback takes its state up: counts go on, what was in force is in force."""
    callbacks = suite()
    trainer = make_trainer(run, callbacks, max_steps=STEP + 30)
    module = Regression()
    seen = {}

    def first_step(trainer, pl_module, *args):
        seen.setdefault("rate", trainer.optimizers[0].param_groups[0]["lr"])
        backoff = named(callbacks, "AutoRollback").backoff
        seen.setdefault("holds", dict(backoff.holds))
        seen.setdefault("factors", (backoff.lr_factor, backoff.clip_factor))
        seen.setdefault("taken", named(callbacks, "AdaptiveGradientClipping").taken)
        seen.setdefault("step", trainer.global_step)

    monitor = named(callbacks, "GradientMonitor")
    monitor.on_train_batch_start, original = (
        lambda *a: (first_step(*a), original(*a)),
        monitor.on_train_batch_start,
    )
    with caplog.at_level(logging.INFO, "lightning.pytorch.lit_stability"):
        trainer.fit(module, regression_data(), ckpt_path=find_last_good(run))
    # The run before it failed: learning rate and clip are halved, on top of the rate that is held.
    assert seen["step"] == STEP
    assert seen["holds"] == {0: (pytest.approx(0.001),)}
    assert seen["factors"] == (0.5, 0.5)
    assert trainer.global_step == STEP + 30
    lines = " ".join(record.getMessage() for record in caplog.records)
    assert "failed" in lines
    # The kept step is computed again before the first step: another loss would raise.
    assert "another loss" not in lines
    assert all(torch.isfinite(p).all() for p in module.parameters())
    state = monitor.state_dict()
    assert state["incidents"] == 3
    assert state["attempts"] > 142


def test_every_callback_state_of_the_checkpoint_is_loaded(run):
    """A state of 0.1.0 loads, and is given away again with what it held."""
    path = find_last_good(run)
    saved = torch.load(path, weights_only=True)["callbacks"]
    callbacks = suite()
    trainer = make_trainer(run, callbacks, max_steps=STEP)
    # `max_steps` is reached: nothing is trained, what was loaded is what is saved.
    trainer.fit(Regression(), regression_data(), ckpt_path=path)
    names = {type(each).__name__ for each in callbacks}
    assert {name for name in saved if name.split("{")[0] in names} == set(saved)
    rollback, fallback = (named(callbacks, n) for n in ("AutoRollback", "PrecisionFallback"))
    left = saved["AutoRollback"]["ladder"]["left"]
    assert (
        rollback.state_dict()["ladder"]["left"]
        == left
        == {"skips": 100, "rollbacks": 7, "holds": 7}
    )
    assert fallback.state_dict()["ladder"]["calm"] == saved["PrecisionFallback"]["ladder"]["calm"]


def test_checkpoint_is_examined():
    report = examine(torch.load(find_last_good(WRITTEN), weights_only=True))
    assert report.run.global_step == STEP
    assert report.healthy
    past = [f for f in report.findings if f.what == "incidents"]
    assert [f.why for f in past] == ["3 so far"]
    assert "3 so far" in format_report(report)
