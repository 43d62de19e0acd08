"""What a run is saved from: the table is sound, its figures are what they say, and so is a row."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.alternatives import PROTECTIONS, missing
from benchmarks.alternatives.protection import Protection
from benchmarks.rescue import report
from benchmarks.rescue.disturbances import BatchFault, CorruptData, InjectedFault, filled, scaled
from benchmarks.rescue.judge import BARE, judge_all
from benchmarks.rescue.run import Outcome, run
from benchmarks.rescue.scenario import Scenario
from benchmarks.rescue.table import QUICK, SCENARIOS, by_name, with_twins
from benchmarks.rescue.workers import Job, run_all
from lit_stability import faults
from lit_stability.diagnosis import CAUSES
from tests.rescue_server import serve

SUITE = "this suite"
FAULTY = [s for s in SCENARIOS.values() if not s.healthy]


def short(name, steps, **changes):
    """A scenario of the table, cut off early."""
    scenario = SCENARIOS[name]
    return replace(scenario, task=replace(scenario.task, steps=steps), **changes)


def outcome(scenario="fault", protection=BARE, **known):
    return Outcome(**({"seed": 0, "ended": "finished"} | known), **locals_of(scenario, protection))


def locals_of(scenario, protection):
    return {"scenario": scenario, "protection": protection}


def test_table_has_every_injector_five_models_and_ten_healthy_runs():
    """K3, K4: what the project promises is what the table tries."""
    disturbances = [s.disturbance for s in FAULTY]
    injecting = [d for d in disturbances if isinstance(d, InjectedFault | BatchFault)]
    injected = {type(disturbance.fault()) for disturbance in injecting}
    every = {
        each
        for each in vars(faults).values()
        if isinstance(each, type) and issubclass(each, faults.Fault) and each is not faults.Fault
    }
    # A batch of shuffled bytes does a language model no harm: it is among the healthy runs.
    # An output that flips a bit is for the audit: most runs do not notice it.
    assert every - injected == {faults.BadBatch, faults.CorruptOutput}
    models = {name.split(",")[1].strip() for name in SCENARIOS if name.count(",") >= 2}
    assert models >= {"byte GPT", "translation", "causal", "CNN", "GRU"}
    assert sum(s.healthy for s in SCENARIOS.values()) >= 10


@pytest.mark.parametrize("scenario", FAULTY, ids=lambda s: s.name)
def test_faulty_scenario_states_causes_that_are_known_and_begins_before_its_end(scenario):
    assert set(scenario.causes) <= set(CAUSES)
    assert scenario.step < scenario.task.steps
    if isinstance(scenario.disturbance, InjectedFault | BatchFault):
        assert scenario.disturbance.fault().step == scenario.step
    assert by_name(scenario.undisturbed().name).healthy


def test_parameters_of_the_faults_are_there_to_be_struck():
    modules = {}
    for scenario in FAULTY:
        disturbance = scenario.disturbance
        if not isinstance(disturbance, InjectedFault):
            continue
        pattern = getattr(disturbance.fault(), "parameter", None)
        if pattern is None or pattern == "*":
            continue
        module = modules.setdefault(scenario.task.name, scenario.task.module())
        assert faults._matching(module, pattern)


def test_quick_table_has_every_family():
    families = {s.family for s in SCENARIOS.values()}
    assert {SCENARIOS[name].family for name in QUICK} == families


def test_scenario_of_an_unknown_name_is_an_error_that_repeats_it():
    with pytest.raises(ValueError, match="no scenario 'NaN los'"):
        with_twins(["NaN los"])


def test_scenario_without_an_acceptable_cause_is_refused():
    with pytest.raises(ValueError, match=r"causes=\(\) of 'x'"):
        Scenario(name="x", family="weights", task=SCENARIOS["CNN"].task)


def test_scenarios_come_with_their_twins_before_them():
    names = [s.name for s in with_twins(["NaN loss, CNN, step 355", "learning rate diverges"])]
    assert names == [
        *("CNN", "learning rate diverges, twin"),
        *("NaN loss, CNN, step 355", "learning rate diverges"),
    ]


def test_protection_that_is_not_installed_is_listed_with_its_error(monkeypatch):
    class Absent(Protection):
        name = "absent"

        def callbacks(self, folder):
            import no_such_package  # noqa: F401

    monkeypatch.setitem(PROTECTIONS, "absent", Absent)
    assert missing()["absent"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert not set(missing()) & {BARE, "clipping at 1.0", "SpikeDetection", SUITE}


@functools.cache
def twin_loss(steps):
    found = run(short("CNN", steps).undisturbed(), BARE, 0)
    return found.loss


@pytest.mark.parametrize(
    ("protection", "ended", "alarms"),
    [(BARE, "NaN", ()), ("clipping at 1.0", "NaN", ()), ("SpikeDetection", "stopped", (45,))],
)
def test_nan_loss_ends_as_the_protection_lets_it(protection, ended, alarms):
    disturbance = InjectedFault(lambda: faults.NanLoss(step=45))
    found = run(short("CNN", 60, disturbance=disturbance), protection, 0)
    assert (found.ended, found.loss, found.alarms) == (ended, None, alarms)


@pytest.mark.parametrize(
    ("fault", "kind", "done", "exact"),
    [
        (faults.NanLoss, "non-finite loss", "step retried", True),
        (faults.ScaleLoss, "gradient spike", "step retried", True),
        (faults.JumpLearningRate, "learning-rate jump", "learning rate held, x0.00333", False),
        (faults.CorruptWeight, "non-finite weight", "rolled back and replayed", True),
        (faults.CorruptMoment, "optimizer state", "rolled back and replayed", True),
    ],
)
def test_fault_is_answered_with_the_smallest_remedy_and_the_twins_loss_is_reached(
    fault, kind, done, exact
):
    """K3, N1, N3: a fault that strikes once costs nothing, to the bit."""
    found = run(short("CNN", 60, disturbance=InjectedFault(lambda: fault(step=45))), SUITE, 0)
    (incident,) = found.incidents
    assert incident.startswith(f"step 45: {kind}; ")
    assert incident.endswith(f" -> {done}; recovered")
    assert found.loss <= 1.05 * twin_loss(60)
    assert found.loss == twin_loss(60) or not exact
    assert (found.updates, found.alarms) == (60, (45,))


def test_fault_that_is_bound_to_its_batch_returns_and_costs_that_batch():
    """N1, N5."""
    scenario = short("CNN", 60, disturbance=BatchFault(lambda: faults.NanLoss(step=40)))
    found = run(scenario, SUITE, 0)
    assert (found.batches, found.updates, len(found.alarms)) == (62, 60, 1)
    assert found.incidents[0].endswith("-> step retried, step skipped; recovered")


def test_corrupt_data_are_corrupt_in_their_range_of_batches():
    data = DataLoader(TensorDataset(torch.ones(12, 2), torch.zeros(12), torch.arange(12)), 3)
    CorruptData(1, scaled(5.0), last=2).corrupt(data)
    assert [float(x.max()) for x, _, _ in data] == [1.0, 5.0, 5.0, 1.0]
    assert [float(x.max()) for x, _, _ in data] == [1.0] * 4, "counted over all epochs"


def test_filling_leaves_zeros_and_the_other_tensors_alone():
    fill = filled(7.0, index=1)
    assert fill(torch.tensor([0.0, 2.0]), 0).tolist() == [0.0, 2.0]
    assert fill(torch.tensor([0.0, 2.0]), 1).tolist() == [0.0, 7.0]


FAULT = Scenario(
    name="fault", family="weights", task=SCENARIOS["CNN"].task, step=100, causes=("glitch",)
)
HOPELESS = replace(FAULT, name="hopeless", beyond_remedy="it cannot be")
TABLE = {s.name: s for s in (SCENARIOS["CNN"], FAULT, HOPELESS)}
TWIN = outcome("CNN", loss=2.0, batches=360, updates=360, cpu_seconds=1.0)


def judged(*outcomes):
    """Verdicts on outcomes beside a clean twin of loss 2."""
    return judge_all(TABLE, [TWIN, *outcomes], frozenset({SUITE}))[1:]


@pytest.mark.parametrize(
    ("loss", "ended", "ratio", "saved"),
    [
        (2.1, "finished", 1.05, True),
        (2.2, "finished", 1.1, False),
        (1.0, "finished", 0.5, True),
        (2.0, "stopped", 1.0, False),
        (None, "NaN", None, False),
        (None, "hung", None, False),
    ],
)
def test_run_is_saved_if_it_finishes_within_five_percent_of_its_twin(loss, ended, ratio, saved):
    (verdict,) = judged(outcome(loss=loss, ended=ended))
    assert (verdict.ratio, verdict.saved) == (ratio, saved)


def test_run_beyond_remedy_counts_as_saved_if_its_cause_is_named():
    right, wrong = judged(
        outcome("hopeless", SUITE, ended="stopped", loss=9.0, cause="glitch"),
        outcome("hopeless", SUITE, loss=2.0, cause="bad batch"),
    )
    assert (right.saved, wrong.saved) == (True, False)


def test_alarms_before_the_strike_are_false_and_the_first_after_it_counts():
    (verdict,) = judged(outcome(protection=SUITE, alarms=(40, 103, 110)))
    assert (verdict.detected, verdict.delay, verdict.false_alarms) == (True, 3, 1)
    (verdict,) = judged(outcome("CNN", SUITE, alarms=(40, 103), loss=2.0))
    assert (verdict.detected, verdict.delay, verdict.false_alarms) == (False, 40, 2)


@pytest.mark.parametrize(
    ("batches", "updates", "lost"),
    [(360, 360, 0), (381, 360, 21), (360, 350, 10), (362, 359, 3), (381, None, 21)],
)
def test_steps_lost_are_batches_taken_twice_and_updates_left_out(batches, updates, lost):
    (verdict,) = judged(outcome(batches=batches, updates=updates))
    assert verdict.lost == lost


def test_tables_count_what_they_say():
    """Known answers: two faults, of which the bare run survives one."""
    scenarios = {**TABLE, "other": replace(FAULT, name="other")}
    rows = [
        TWIN,
        outcome("CNN", SUITE, loss=2.0, cpu_seconds=1.5),
        outcome("fault", loss=None, ended="NaN", batches=360, updates=360),
        outcome("other", loss=2.02, batches=360, updates=360),
        outcome("fault", SUITE, loss=2.0, alarms=(101,), cause="glitch", batches=370, updates=360),
        outcome("other", SUITE, loss=3.0, alarms=(105,), cause="bad batch", batches=360),
    ]
    verdicts = judge_all(scenarios, rows, frozenset({SUITE}))
    bare, suite = report.by_protection(verdicts, frozenset({SUITE})).rows
    assert bare == [BARE, "1/2", "0/1", "0/1", "-", "-", "-", "-", "0", "0", "1", "0"]
    assert suite == [SUITE, "1/2", "1/1", "1/1", "2/2", "3", "1/2", "-", "10", "0", "0", "0"]
    assert report.by_family(verdicts).rows == [["weights", "1/2", "1/2"]]
    bare, suite = report.on_healthy(verdicts, frozenset({SUITE})).rows
    assert suite == [SUITE, "0/1", "0", "1/1", "0/1", "0/1", "1.50"]
    cells = report.everything(verdicts).rows[1]
    assert cells == ["weights", "fault", "0", "NaN", "**1.000** @1 named"]


def test_outcome_survives_json():
    found = outcome(protection=SUITE, alarms=(1, 2), incidents=("step 1: spike",), loss=2.0)
    assert Outcome.from_dict(found.as_dict()) == found
    assert math.isfinite(found.as_dict()["loss"])


def test_process_that_hangs_or_dies_is_replaced_and_the_table_goes_on():
    jobs = [Job(name, BARE, 0) for name in ("a", "hangs", "b", "dies", "c")]
    found = list(run_all(jobs, processes=1, timeout=1.0, startup_timeout=30.0, serve=serve))
    assert [found[i] for i in (0, 2, 4)] == [jobs[i] for i in (0, 2, 4)]
    hung, dead = found[1], found[3]
    assert (hung.scenario, hung.ended) == ("hangs", "hung")
    assert hung.message == "stopped at the time limit"
    assert (dead.scenario, dead.ended) == ("dies", "failed")
    assert dead.message == "its process ended with exit code 3"
