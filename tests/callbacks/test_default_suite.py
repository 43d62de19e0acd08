"""`stability_callbacks`: options by callback, observe only, and what a Trainer is told."""

import pytest
from lightning.pytorch import Trainer

from lit_stability import (
    AutoRollback,
    Budget,
    GradientFlow,
    GradientMonitor,
    LastKnownGood,
    StabilityCallback,
    find_last_good,
    stability_callbacks,
)
from lit_stability.faults import CorruptWeight, FaultInjector, NanLoss
from tests.callbacks.test_last_known_good import Join
from tests.conftest import fit, flat

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


def names(callbacks):
    return [type(each).__name__ for each in callbacks]


def test_options_are_given_by_callback():
    own = LastKnownGood(keep=5)
    suite = stability_callbacks(
        monitor={"close_after": 3},
        attention={"every": 7},
        good=own,
        preemption=False,
        rollback={"budget": Budget(rollbacks=1), "after_rollback": "skip"},
    )
    assert names(suite) == [n for n in names(stability_callbacks()) if n != "PreemptionCheckpoint"]
    assert (suite[0].close_after, suite[1].every, suite[1].quiet) == (3, 7, True)
    assert suite[6] is own
    assert suite[-1].escalation.budget.rollbacks == 1
    assert suite[-1].after_rollback == "skip"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollback": {"snapshot_evry": 3}}, "did you mean 'snapshot_every'?"),
        ({"rollback": {"snapshot_evry": 3}}, r"rollback=dict\(snapshot_evry=...\): AutoRollback"),
        ({"locator": {"depth": 3}}, "NonFiniteLocator has no such option; it has: none"),
        ({"good": GradientFlow()}, "good must be a dict of options, a callback of LastKnownGood"),
        ({"rollback": True}, "rollback must be a dict of options, a callback of AutoRollback"),
        ({"rollback": {"snapshot_every": 0}}, "snapshot_every must be at least 1, got 0"),
        ({"mode": "watch"}, "mode must be 'protect' or 'observe', got 'watch'"),
        ({"mode": "observe", "rollback": {}}, None),
        ({"mode": "observe", "rollback": {"snapshot_every": 3}}, "has no AutoRollback: leave it"),
        (
            {"monitor": GradientMonitor(), "directory": "runs"},
            r"write monitor=GradientMonitor\(directory='runs'\)",
        ),
        ({"monitor": False}, "the other callbacks need a GradientMonitor"),
    ],
)
def test_wrong_options_are_refused_with_what_to_write(options, message):
    if message is None:
        stability_callbacks(**options)
        return
    with pytest.raises(ValueError, match=message):
        stability_callbacks(**options)


def test_observing_suite_changes_nothing_and_explains(tmp_path):
    """A NaN passes, as it does without the suite; the record says where it came from."""
    faults = lambda: FaultInjector([NanLoss(step=7)])  # noqa: E731
    bare, _ = fit(tmp_path / "bare", [faults()], max_steps=20)
    suite = stability_callbacks(mode="observe")
    module, _ = fit(tmp_path / "run", [faults(), *suite], max_steps=20)
    assert flat(module).isnan().equal(flat(bare).isnan())
    assert module.losses[:7] == bare.losses[:7]
    (incident, *_) = suite[0].incidents
    assert (incident.first.step, incident.responses) == (7, [])
    assert "mul" in incident.origin.op
    healthy, _ = fit(tmp_path / "h", stability_callbacks(mode="observe"), max_steps=20)
    plain, _ = fit(tmp_path / "p", max_steps=20)
    assert flat(healthy).equal(flat(plain))


def test_directory_gets_a_folder_for_each_run(tmp_path):
    records = tmp_path / "records"
    for _ in range(2):
        suite = stability_callbacks(
            directory=records, good={"every_n_steps": 5, "confirm_after": 2}, attention=False
        )
        fault = FaultInjector([CorruptWeight(step=14, parameter="net.0.weight")])
        fit(tmp_path / "elsewhere", [fault, *suite, Join()], max_steps=20)
    runs = sorted((records / "stability").iterdir())
    assert len(runs) == 2
    assert all((run / "incidents.jsonl").exists() and (run / "good").exists() for run in runs)
    assert not (tmp_path / "elsewhere").exists() or not any(
        (tmp_path / "elsewhere").rglob("*.ckpt")
    )
    assert runs[1] in find_last_good(records).parents


def test_callbacks_of_a_user_and_faults_may_be_there_twice():
    class Pager(StabilityCallback):
        pass

    callbacks = [FaultInjector([NanLoss(step=1)]), FaultInjector([NanLoss(step=2)])]
    Trainer(callbacks=[*callbacks, GradientMonitor(), Pager(), Pager()], **QUIET)


def test_trainer_that_an_object_with_a_raising_property_creates_is_left_as_it_is():
    class Study:
        @property
        def trainer(self):
            raise RuntimeError("there is none yet")

        def create(self):
            return Trainer(callbacks=[GradientMonitor()], **QUIET)

    assert names(Study().create().callbacks)[0] == "GradientMonitor"


@pytest.mark.parametrize(
    ("callbacks", "error", "message"),
    [
        (lambda: [stability_callbacks()], TypeError, r"callbacks=\[\*stability_callbacks\(\), "),
        (
            lambda: [*stability_callbacks(), AutoRollback()],
            ValueError,
            r"AutoRollback twice; .* stability_callbacks\(rollback=dict\(...\)\)",
        ),
        (
            lambda: [GradientMonitor(), GradientFlow(), GradientFlow()],
            ValueError,
            "GradientFlow twice; remove one",
        ),
    ],
)
def test_list_in_the_list_and_a_callback_twice_are_refused_by_name(callbacks, error, message):
    with pytest.raises(error, match=message):
        Trainer(callbacks=callbacks(), **QUIET)


def test_old_names_of_options_still_work_with_a_warning():
    with pytest.warns(FutureWarning, match="data was renamed to after_rollback"):
        assert AutoRollback(data="skip").after_rollback == "skip"
    with pytest.raises(TypeError, match="got data and after_rollback, which are the same"):
        AutoRollback(data="skip", after_rollback="skip")
