"""Streams of anomalies and healthy steps in, verdicts out."""

import pytest

from lit_stability.policies.reproducibility import ReproducibilityCheck


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
def test_check_distinguishes_what_recurs(events, verdicts):
    reproducibility, given = ReproducibilityCheck(slack=0), []
    for event in events:
        if isinstance(event, int):
            given.append(reproducibility.passed(event))
        else:
            reproducibility.begin(int(event[1:]))
    assert given == verdicts


def test_check_waits_for_damage_that_shows_late():
    reproducibility = ReproducibilityCheck(slack=3)
    reproducibility.begin(10)
    assert reproducibility.returns(13)
    assert not reproducibility.returns(14)
    assert reproducibility.passed(12) is None
    assert reproducibility.passed(13) == "transient"
    assert not reproducibility.returns(10)


def test_check_ends_when_another_batch_takes_the_place():
    reproducibility = ReproducibilityCheck(slack=0)
    reproducibility.begin(10)
    reproducibility.end()
    assert not reproducibility.returns(10)
    assert reproducibility.passed(10) is None
