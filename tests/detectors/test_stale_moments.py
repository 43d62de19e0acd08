"""Ratios in, one objection out; and the ratios that gradient norms make."""

import math
import random
from types import SimpleNamespace

import pytest

from lit_stability.detectors import StaleMoments
from lit_stability.measurement.second_moment_ratio import SecondMomentRatio
from lit_stability.measurement.step_stats import StepStats

CALM = [1.0, 1.1, 0.9, 1.0, 1.05] * 5
BUILD_UP = [1.4, 1.9, 2.5, 3.0, 3.4]


def run(values, detector=None):
    """Steps at which it objects."""
    detector = detector or StaleMoments()
    out = []
    for step, rms in enumerate(values):
        stats = StepStats(
            step=step, loss=1.0, grad_norm=1.0, moment_rms=rms, moment_rms_name="head.weight"
        )
        anomaly = detector.check(stats)
        if anomaly is not None:
            assert anomaly.warn_only
            assert anomaly.layers == (("head.weight", rms),)
            out.append(step)
        detector.update(stats)
    return out


def ratios(norms, decay=0.999):
    """What the meter makes of gradient norms."""
    kept = SecondMomentRatio()
    found = (kept.measure({"w": norm}, {"w": decay}, taken=True) for norm in norms)
    return [each[0] if each else None for each in found]


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        (CALM + BUILD_UP, [29]),
        (CALM + BUILD_UP + CALM + BUILD_UP, [29]),
        (CALM + [x * 0.7 for x in BUILD_UP], []),
        ([*CALM, 1.0, 1.0, *BUILD_UP[2:]], []),  # without a build-up
        (CALM + [1.4, 1.9, 2.5, 3.0, 1.0] * 3, []),
        ([3 * x for x in CALM] * 3 + BUILD_UP, []),  # not above its own median
        (BUILD_UP * 3, []),  # no history
        ([None] * 50 + CALM + [None, None, *BUILD_UP], [81]),
        (CALM + [math.nan] * 9, []),
    ],
)
def test_build_up_above_the_window_is_told_once(values, steps):
    assert run(values) == steps


@pytest.mark.parametrize(("sigma", "decay"), [(0.1, 0.95), (0.5, 0.99), (1.0, 0.999)])
def test_100_000_steps_of_noise_are_silent(sigma, decay):
    g, kept, detector = random.Random(7), SecondMomentRatio(), StaleMoments()
    for step in range(100_000):
        norm = math.exp(sigma * g.gauss(0, 1))
        found = kept.measure({"w": norm}, {"w": decay}, taken=True) or (None, "")
        stats = SimpleNamespace(step=step, moment_rms=found[0], moment_rms_name="", optimizer=0)
        assert detector.check(stats) is None
        detector.update(stats)


@pytest.mark.parametrize(
    ("norm", "decay", "told"),
    [
        (lambda t: 100 * math.exp(-t / 20) + 1, 0.95, 0),  # the first steps of a run
        (lambda t: 100 * math.exp(-t / 20) + 1, 0.999, 0),
        (lambda t: 1.0 if t % 500 else 1000.0, 0.95, 0),  # a gradient spike now and then
        (lambda t: 1.0 if t % 500 else 1000.0, 0.999, 0),
        (lambda t: 1 + t / 100, 0.999, 0),  # a slow rise
        (lambda t: 1.0 if t < 500 else 3.0, 0.95, 0),  # harder data from a step on
        (lambda t: 1.0 if t < 500 else 3.0, 0.999, 1),  # too soon for this decay
        (lambda t: 1e-9 * (1 + t), 0.95, 0),
    ],
)
def test_course_of_gradient_norms(norm, decay, told):
    g = random.Random(3)
    norms = (norm(t) * math.exp(0.2 * g.gauss(0, 1)) for t in range(1500))
    assert len(run(ratios(norms, decay))) == told


def test_gradients_that_fell_for_long_and_then_grow_are_told():
    """What makes Adam's spikes: a second moment that has decayed and does not follow."""
    norms = [0.97**t for t in range(300)]
    norms += [norms[-1] * 1.5**t for t in range(30)]
    (told,) = run(ratios(norms, 0.99))
    assert 300 < told < 325


def test_what_was_told_is_not_told_again_after_a_resume():
    first, second = StaleMoments(), StaleMoments()
    assert run(CALM + BUILD_UP, first) == [29]
    second.load_state_dict(first.state_dict())
    assert run(CALM + BUILD_UP, second) == []


@pytest.mark.parametrize(
    "options",
    [{"bound": 1.0}, {"ratio": 1.0}, {"sigmas": 0.0}, {"persist": 0}, {"min_history": 0}],
)
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        StaleMoments(**options)
