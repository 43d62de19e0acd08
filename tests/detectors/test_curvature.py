"""Ratios in, one objection out."""

import pytest

from lit_stability.detectors import Curvature
from lit_stability.measurement.step_stats import ProbeReading, StepStats


def run(ratios, detector=None):
    """Steps at which it objects; None is a step without a reading."""
    detector = detector or Curvature(persist=3)
    out = []
    for step, ratio in enumerate(ratios):
        readings = () if ratio is None else (ProbeReading("curvature_ratio", "", ratio),)
        stats = StepStats(step=step, loss=1.0, grad_norm=1.0, readings=readings)
        if detector.check(stats) is not None:
            out.append(step)
        detector.update(stats)
    return out


@pytest.mark.parametrize(
    ("ratios", "steps"),
    [
        ([1.1] * 9, [2]),
        ([0.99] * 9, []),
        ([1.0] * 9, []),
        ([1.2, 1.2, 0.9] * 4, []),
        ([1.2, None, None, 1.2, None, 1.2], [5]),
        ([1.2, 1.2, float("nan"), 1.2, 1.2], []),
        ([float("inf")] * 3, [2]),
        ([None] * 9, []),
    ],
)
def test_ratio_above_the_edge_for_some_readings_is_reported_once(ratios, steps):
    assert run(ratios) == steps


def test_warning_is_not_repeated_after_a_resume():
    first, second = Curvature(persist=3), Curvature(persist=3)
    assert run([1.1] * 5, first) == [2]
    second.load_state_dict(first.state_dict())
    assert run([1.1] * 5, second) == []


@pytest.mark.parametrize("options", [{"bound": 0.0}, {"persist": 0}])
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        Curvature(**options)
