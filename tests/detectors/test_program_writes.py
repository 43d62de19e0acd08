"""Writes of the program are told from damage by whether they come again."""

from dataclasses import replace

import pytest

from lit_stability.detectors import Anomaly, DetectorSet, Divergence, Spike
from lit_stability.detectors.program_writes import ProgramWrites
from lit_stability.measurement.step_stats import StepStats


def stats(step, *names, share=1.0, loss=1.0, norm=1.0):
    writes = tuple((name, share) for name in names)
    return StepStats(step=step, loss=loss, grad_norm=norm, outside_writes=writes)


def test_write_that_comes_again_is_accepted_and_damage_is_not():
    writes = ProgramWrites()
    anomaly = writes.check(stats(10, "w"))
    assert anomaly.state_corrupted
    writes.rolled_back_for(anomaly)
    assert writes.check(stats(10)) is None  # it did not come again
    writes.rolled_back_for(writes.check(stats(20, "w")))
    assert writes.check(stats(20, "w")) is None
    assert writes.accepted == {"w"}
    assert writes.check(stats(30, "w")) is None


DAMAGE = {"step": 12, "value": 9.0, "signal": "loss", "message": "", "state_corrupted": True}
HARM = [
    Anomaly(kind="divergence", since=7, **DAMAGE),
    Anomaly(kind="non-finite weight", layers=(("w", float("nan")),), **DAMAGE),
]


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.kind)
def test_write_that_did_harm_is_accepted_only_when_it_comes_without_its_batch(harm):
    writes = ProgramWrites()
    writes.rolled_back_for(harm)
    anomaly = writes.check(stats(8, "w"))
    assert anomaly.suspect == 7
    assert not writes.accepted
    writes.rolled_back_for(anomaly)
    assert writes.check(stats(8, "w")) is None
    assert writes.accepted == {"w"}


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.kind)
def test_write_that_cannot_have_done_the_harm_is_accepted_at_once(harm):
    writes = ProgramWrites()
    writes.rolled_back_for(harm)
    assert writes.check(stats(2, "v")) is None
    assert writes.accepted == {"v"}


def test_non_finite_write_is_never_accepted():
    writes = ProgramWrites()
    writes.rolled_back_for(writes.check(stats(10, "w")))
    assert writes.check(stats(10, "w", share=float("inf"))) is not None
    writes.check(stats(10, "w", share=float("nan")))
    assert not writes.accepted


def test_write_is_accepted_the_second_time_where_no_step_runs_again():
    writes = ProgramWrites()
    found = [writes.check(stats(step, *names)) for step, names in ((5, "w"), (6, ""), (9, "w"))]
    assert [anomaly is not None for anomaly in found] == [True, False, False]


def test_small_writes_are_not_questioned():
    assert ProgramWrites().check(stats(10, "w", share=0.01)) is None


def test_accepted_write_of_one_parameter_does_not_excuse_another():
    writes = ProgramWrites()
    writes.load_state_dict({"accepted": ["w"]})
    assert writes.check(stats(3, "w", "v")).layers == (("v", 1.0),)


def detectors(accepted=("w",)):
    found = DetectorSet([Spike(), Divergence()], [0], lambda line: None)
    found.load_state_dict({"0": [["ProgramWrites", {"accepted": list(accepted)}]]})
    for i in range(40):
        found.verdict(stats(i), voting=False)
        found.learn(stats(i))
    return found


@pytest.mark.parametrize("after", [0, 1])
def test_spike_right_after_an_accepted_write_is_accepted(after):
    found = detectors()
    if after:
        found.verdict(stats(40, "w"), voting=False)
    anomaly, _ = found.verdict(stats(40 + after, *("w",) * (not after), norm=100.0), voting=False)
    assert anomaly is None
    assert found.regime_change.cause == "weights written by the program"


def test_spike_is_flagged_where_the_program_writes_all_the_time():
    found = detectors()
    for i in range(40, 50):
        found.verdict(stats(i, "w"), voting=False)
        found.learn(stats(i, "w"))
    assert found.verdict(stats(50, "w", norm=100.0), voting=False)[0].kind == "gradient spike"


def test_accepted_parameters_stay_accepted_when_an_older_state_is_restored():
    writes = ProgramWrites()
    before = writes.state_dict()
    writes.load_state_dict({"accepted": ["w"]})
    writes.load_state_dict(before)
    assert writes.accepted == {"w"}


def test_write_between_two_epochs_is_not_questioned():
    writes = ProgramWrites()
    border = replace(stats(20, "w"), starts_epoch=True)
    assert writes.check(border) is None
    assert not writes.accepted
    assert writes.explains(corruption("w", since=15))
    assert not writes.explains(corruption("w", since=21))
    assert not writes.explains(corruption("w", "v", since=15))


def corruption(*names, since):
    layers = tuple((name, 9.0) for name in names)
    found = {"kind": "weight corruption", "value": 9.0, "message": "", "signal": "weight_norm"}
    return Anomaly(step=30, since=since, layers=layers, **found)


def damaged_moments(step, value):
    return Anomaly(
        kind="optimizer state",
        step=step,
        value=value,
        signal="moment_ratio",
        layers=(("w", value),),
        state_corrupted=True,
        message="",
    )


@pytest.mark.parametrize(("value", "explained"), [(0.01, True), (float("nan"), False)])
def test_finite_moments_that_are_written_again_are_the_programs(value, explained):
    writes = ProgramWrites()
    first = damaged_moments(10, value)
    assert not writes.explains(first)
    writes.rolled_back_for(first)
    assert not writes.explains(damaged_moments(12, value)), "of another step"
    assert writes.explains(first) == explained
    spike = replace(first, kind="update spike", step=12, since=11)
    assert writes.explains(spike) == explained
    assert not writes.explains(replace(spike, step=22, since=21)), "long after"
    restored = ProgramWrites()
    restored.load_state_dict(writes.state_dict())
    assert restored.explains(damaged_moments(50, value)) == explained
