"""S9: a stream of loss scales in, what is objected to out."""

import math

import pytest

from lit_stability.detectors import LossScale
from lit_stability.measurement.step_stats import StepStats

INF = math.inf


def scaler(overflows, scale=2.0**16, growth_interval=50):
    """Steps of a loss scaler: halved at each overflow, doubled after enough steps without."""
    calm = 0
    for step, overflow in enumerate(overflows):
        yield StepStats(step=step, loss=1.0, grad_norm=INF if overflow else 1.0, loss_scale=scale)
        calm = 0 if overflow else calm + 1
        if overflow:
            scale /= 2
        elif calm == growth_interval:
            scale, calm = scale * 2, 0


def found(steps, detector=None):
    detector = detector or LossScale()
    out = []
    for stats in steps:
        anomaly = detector.check(stats)
        if anomaly is not None:
            out.append((anomaly.kind, stats.step, anomaly.warn_only))
        if anomaly is None or anomaly.warn_only:
            detector.update(stats)
    return out


HEALTHY = {
    "no overflow": [False] * 500,
    "a search of 14": [True] * 14 + [False] * 500,
    "one now and then": ([False] * 50 + [True]) * 20,
    "two in a row after growth": ([False] * 100 + [True] * 2) * 10,
    "a slow descent": ([False] * 40 + [True]) * 20,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_work_of_a_healthy_scaler_is_not_objected_to(name):
    assert found(scaler(HEALTHY[name], scale=2.0**24)) == []


def test_overflow_at_the_floor_is_a_collapse_from_there_on():
    steps = list(scaler([True] * 30))
    assert found(steps)[0] == ("loss-scale collapse", 26, False)
    assert steps[26].loss_scale == 2.0**-10


def test_scale_of_zero_is_a_collapse():
    (stats,) = scaler([True], scale=0.0)
    assert "loss scale of 0," in LossScale().check(stats).message


def test_fall_of_eight_halvings_from_a_stable_scale_is_reported():
    assert found(scaler([False] * 30 + [True] * 10))[:2] == [
        ("loss-scale fall", 38, True),
        ("loss-scale fall", 39, True),
    ]


def test_fall_is_seen_between_steps_that_pass_too():
    fall = ([True] * 3 + [False] * 5) * 4
    assert found(scaler([False] * 30 + fall))[0][:2] == ("loss-scale fall", 30 + 8 + 8 + 2)


def test_infinite_loss_with_finite_gradients_is_named_and_the_step_is_good():
    stats = StepStats(step=3, loss=INF, grad_norm=2.0, loss_scale=1.0)
    anomaly = LossScale().check(stats)
    assert (anomaly.kind, anomaly.warn_only) == ("infinite loss", True)
    assert "all gradients are finite" in anomaly.message


@pytest.mark.parametrize("loss", [INF, 1.0])
def test_nothing_is_flagged_without_a_scaler(loss):
    assert LossScale().check(StepStats(step=0, loss=loss, grad_norm=INF)) is None


def test_state_survives_a_round_trip():
    whole, first, second = LossScale(), LossScale(), LossScale()
    steps = list(scaler([False] * 30 + [True] * 10))
    expected = found(steps, whole)
    before = found(steps[:33], first)
    second.load_state_dict(first.state_dict())
    assert before + found(steps[33:], second) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": -1.0}, "floor must be at least 0, got -1.0"),
        ({"halvings": 0}, "halvings must be at least 1, got 0"),
        ({"within": 0}, "within must be at least 1, got 0"),
    ],
)
def test_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossScale(**options)
