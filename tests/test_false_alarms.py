"""Runs with which nothing is wrong: nobody may object."""

import pytest

from benchmarks.false_alarms import FAMILIES, count, every_detector, healthy_cases, synthetic
from lit_stability.detectors import default_detectors

STEPS = 3000
EXPECTED = {
    # What does object, and rightly: noise with real twentyfold values; a loss that triples.
    "Student-t 0.3": {"UpdateSpike", "Spike('grad_norm')", "Spike('loss')"},
    "curriculum x3": {"Divergence", "Spike('loss')"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_synthetic_run_raises_no_false_alarm(name):
    """V1, and every other: 100,000 steps of each are counted by ``benchmarks.false_alarms``."""
    found = count(synthetic(FAMILIES[name], STEPS), every_detector())
    assert {n for n, c in found.items() if c} <= EXPECTED.get(name, set())


def test_table_has_every_default_detector_and_healthy_case():
    names = set(count([], every_detector()))
    assert len(names) == len(default_detectors()) + 1
    assert all(case.cause is None for case in healthy_cases())
    assert len(healthy_cases()) == 6
