"""Streams of norms, losses and rates, and the expected warnings."""

import math

import numpy as np
import pytest

from lit_stability.detectors import Vanishing
from tests.detectors.streams import anomalies_of, anomalies_with_a_resume, steps_of

TINY = 1e-9


def rows(norms, losses, rates=None):
    rates = [1e-3] * len(norms) if rates is None else rates
    return [
        {"grad_norm": norm, "loss": loss, "learning_rates": (rate,)}
        for norm, loss, rate in zip(norms, losses, rates, strict=True)
    ]


def small():
    return Vanishing(persist=10, min_step=0, block=10)


FALLING = np.linspace(5.0, 2.0, 100).tolist()
STUCK = [*FALLING, *[4.0] * 60]
"""A run that learns, then loses what it has learnt."""


@pytest.mark.parametrize(
    ("norms", "losses", "expected"),
    [
        # Gone with what was learnt: reported once, when the block of losses shows it.
        ([1.0] * 100 + [TINY] * 60, STUCK, [110]),
        ([1.0] * 100 + [0.0] * 60, STUCK, [110]),
        # Reported again after it came back in between.
        ([1.0] * 100 + [TINY] * 20 + [1.0] * 5 + [TINY] * 35, STUCK, [110, 134]),
        # Not ten in a row; not tiny; NaN neither counts nor clears.
        ([1.0] * 100 + ([TINY] * 9 + [1.0]) * 6, STUCK, []),
        ([1.0] * 100 + [2e-6] * 60, STUCK, []),
        ([1.0] * 100 + [TINY] * 5 + [math.nan] * 5 + [TINY] * 50, STUCK, [114]),
        # A run whose norms were always like that is not judged by the bound alone.
        ([1e-4] * 100 + [5e-7] * 60, STUCK, []),
        # Dead from the start.
        ([TINY] * 160, [5.0] * 160, [51]),
        # Small gradients under which the loss falls are what the model has.
        ([TINY] * 160, np.linspace(5.0, 1.0, 160).tolist(), []),
        # Converged: the loss stands at the lowest it has been.
        ([1.0] * 100 + [TINY] * 60, [*FALLING, *[2.0] * 60], []),
        ((10.0 ** -(np.arange(160) / 10)).tolist(), [*FALLING, *[2.0] * 60], []),
    ],
)
def test_vanished_gradient_is_reported_where_the_loss_is_too_high(norms, losses, expected):
    """V1: it persists, and the loss no longer falls."""
    assert steps_of(anomalies_of(small(), rows(norms, losses))) == expected


def test_norm_below_the_bound_early_in_a_warm_up_is_silent():
    """V1: grad_norm < 1e-6 at step 14 of a 4000-step warm-up; and for all of the warm-up."""
    rates = [1e-3 * (i + 1) / 4000 for i in range(4000)]
    for norms in ([1.0] * 14 + [5e-7] + [1.0] * 3985, [5e-7] * 4000):
        assert anomalies_of(Vanishing(), rows(norms, [9.0] * 4000, rates)) == []


def test_norm_that_is_still_tiny_after_the_warm_up_is_reported():
    """V1: the same norms at full learning rate."""
    rates = [1e-3 * min(1.0, (i + 1) / 400) for i in range(1000)]
    (anomaly,) = anomalies_of(Vanishing(), rows([5e-7] * 1000, [9.0] * 1000, rates))
    assert 400 < anomaly.step < 500
    assert anomaly.warn_only
    assert not anomaly.state_corrupted
    assert "for 451 steps" in anomaly.message


def test_end_of_a_decay_is_silent():
    """V1: the learning rate is taken into account."""
    rates = [1e-3] * 100 + [1e-3 * 0.9**i for i in range(60)]
    norms = [1.0] * 107 + [TINY] * 53
    assert anomalies_of(small(), rows(norms, STUCK, rates)) == []


def test_nothing_is_reported_before_the_minimum_step():
    """V1."""
    detector = Vanishing(persist=10, min_step=130, block=10)
    stream = rows([1.0] * 100 + [TINY] * 60, STUCK)
    assert steps_of(anomalies_of(detector, stream)) == [130]


def test_resume_neither_forgets_nor_tells_twice():
    stream = rows([1.0] * 100 + [TINY] * 60, STUCK)
    for at in (60, 105, 111, 140):
        assert steps_of(anomalies_with_a_resume(small, stream, at)) == [110]


@pytest.mark.parametrize(
    "options",
    [{"bound": 0.0}, {"ratio": 1.0}, {"persist": 0}, {"min_step": -1}, {"min_history": 101}],
)
def test_option_out_of_range_is_refused_and_repeated(options):
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} .*got {next(iter(options.values()))}"
    ):
        Vanishing(**options)
