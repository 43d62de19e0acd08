"""Trends of learning rate and loss: what is stable, what has fallen."""

import math

import numpy as np
import pytest

from lit_stability.detectors.trends import LearningRateTrend, LossTrend
from tests.detectors.streams import step, through_a_checkpoint


def stable(rates, **options):
    """Steps after which the rate counts as stable."""
    trend, out = LearningRateTrend(**options), []
    for i, rate in enumerate(rates):
        trend.update(step(i, learning_rates=(rate / 7,), nominal_learning_rates=(0.0, rate)))
        if trend.stable:
            out.append(i)
    return out


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([1.0] * 6, [3, 4, 5]),
        ([i / 100 for i in range(50)], []),
        ([0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.3], [4]),
        ([1.0] * 5 + [0.5] * 2 + [0.49] * 5, [3, 4, 5, 6]),
        ([0.0] * 5, [2, 3, 4]),
    ],
)
def test_rate_is_stable_neither_in_a_warm_up_nor_at_the_end_of_a_decay(rates, expected):
    """V1."""
    assert stable(rates, stable_after=3) == expected


def test_unknown_rate_becomes_stable_in_time():
    trend = LearningRateTrend(stable_after=2)
    for i in range(2):
        trend.update(step(i))
    assert trend.stable


def course_of(losses, **options):
    trend = LossTrend(**options)
    for loss in losses:
        trend.update(loss)
    return trend


@pytest.mark.parametrize(
    ("losses", "learnt", "stale"),
    [
        ([4.0] * 12, False, 2),
        ([4.0] * 4 + [3.0] * 8, True, 1),
        ([4.0] * 4 + [3.97] * 8, False, 2),
        # A slow fall adds up.
        ([4.0 - 0.005 * i for i in range(40)], True, 1),
        # Fallen within the first block.
        ([4.0] * 3 + [1.0] * 13, True, 2),
        # Non-finite losses are ignored.
        ([4.0, math.nan] * 4 + [math.inf, 3.0] * 4, True, 0),
        ([4.0] * 4 + [5.0] * 8, False, 2),
        ([-2.0] * 4 + [-2.1] * 4, True, 0),
    ],
)
def test_loss_has_learnt_where_it_fell_below_its_first_values(losses, learnt, stale):
    trend = course_of(losses, block=4)
    assert (trend.learnt, trend.stale) == (learnt, stale)


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_fall_and_more_than_a_sigma_is(seed):
    noise = np.random.default_rng(seed).standard_normal(1000)
    assert not course_of((10 + noise).tolist()).learnt
    assert course_of((10 + noise - 1.2 * (np.arange(1000) > 500)).tolist()).learnt


def test_loss_above_its_lowest_is_distinguished_from_noise():
    noise = 0.1 * np.random.default_rng(0).standard_normal(400)
    level = np.repeat([3.0, 2.0, 2.05, 2.5], 100)
    trend = course_of((level + noise)[:300].tolist())
    assert not trend.above_lowest
    for loss in (level + noise)[300:].tolist():
        trend.update(loss)
    assert trend.above_lowest


def test_courses_survive_a_round_trip():
    losses, rates = [4.0, 3.0, 3.5, 2.0, 2.5], [0.1, 0.2, 0.2, 0.2]
    first, second = course_of(losses, block=2), LossTrend(block=2)
    second.load_state_dict(through_a_checkpoint(first.state_dict()))
    first.update(1.0), second.update(1.0)
    assert first.state_dict() == second.state_dict()
    assert (second.first, second.recent) == (3.5, 1.75)
    rate, other = LearningRateTrend(stable_after=3), LearningRateTrend(stable_after=3)
    for i, each in enumerate(rates):
        rate.update(step(i, learning_rates=(each,)))
    other.load_state_dict(through_a_checkpoint(rate.state_dict()))
    other.update(step(4, learning_rates=(0.2,)))
    assert other.stable


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (LearningRateTrend, {"stable_after": 0}),
        (LearningRateTrend, {"share": 1.5}),
        (LossTrend, {"block": 1}),
        (LossTrend, {"fall": -0.1}),
    ],
)
def test_option_out_of_range_is_refused_and_repeated(make, options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        make(**options)
