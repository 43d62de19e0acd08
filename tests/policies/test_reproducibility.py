"""Streams of anomalies and healthy steps in, verdicts out."""

import pytest

from lit_stability.policies.reproducibility import Trial


@pytest.mark.parametrize(
    ("events", "verdicts"),
    [
        # "x7": an anomaly at step 7; 7: a healthy step 7.
        (["x7", 6, 7], [None, "transient"]),
        (["x7", 7, 8], ["transient", None]),
        (["x7", "x7", 7], ["deterministic"]),
        (["x7", "x5", 7], ["deterministic"]),
        (["x7", 7, "x7", 7], ["transient", "transient"]),
        ([3], [None]),
    ],
)
def test_trial_tells_what_returns_from_what_does_not(events, verdicts):
    trial, given = Trial(slack=0), []
    for event in events:
        if isinstance(event, int):
            given.append(trial.passed(event))
        else:
            trial.begin(int(event[1:]))
    assert given == verdicts


def test_trial_waits_for_damage_that_shows_late():
    trial = Trial(slack=3)
    trial.begin(10)
    assert trial.returns(13)
    assert not trial.returns(14)
    assert trial.passed(12) is None
    assert trial.passed(13) == "transient"
    assert not trial.returns(10)


def test_trial_ends_when_another_batch_takes_the_place():
    trial = Trial(slack=0)
    trial.begin(10)
    trial.end()
    assert not trial.returns(10)
    assert trial.passed(10) is None
