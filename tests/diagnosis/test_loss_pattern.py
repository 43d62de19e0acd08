"""Patterns of a diverging loss."""

import math
import random

import pytest

from lit_stability.diagnosis import loss_pattern

NAN, INF = math.nan, math.inf
JUMP, GROWTH, SWINGS = "sudden jump", "exponential growth", "oscillating divergence"


def name(losses):
    found = loss_pattern(losses)
    return None if found is None else found.name


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.8, 1.7, 1.6, 1.5, 1.4, 87234.5, NAN], JUMP),
        ([2.1, 2.2, 2.5, 3.1, 4.8, 9.2, 23.5, 156.7, NAN], GROWTH),
        ([2.0, 1.8, 2.2, 1.6, 2.5, 1.4, 3.2, 1.2, 5.8, NAN], SWINGS),
        ([2.1, 2.0, 1.9, 8734.5, NAN], JUMP),
        ([2.1, 2.3, 2.8, 4.5, 12.3, 89.7, NAN], GROWTH),
        ([2.1, 1.8, 2.5, 1.6, 3.2, 1.4, 5.8, NAN], SWINGS),
    ],
    ids=["A", "B", "C", "mode 1", "mode 2", "mode 3"],
)
def test_printed_sequences_are_named(losses, expected):
    """S2: the known answers."""
    assert name(losses) == expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], None),
        ([2.0], None),
        ([NAN], None),
        ([2.0, 1.9, INF], JUMP),
        # What came after the loss was lost is not looked at.
        ([2.0, 1.9, NAN, 5.0, 50.0, 500.0], JUMP),
        # A jump that stays up.
        ([2.0, 2.1, 1.9, 2.0, 2.05, *[30.0, 31.0, 29.0, 30.5]], JUMP),
        # A jump after three steps that happen to rise, by no more than the noise.
        ([0.4, 0.6] * 8 + [0.4, 0.5, 0.55, 0.8, 14.0], JUMP),
        # Growth with a dip in it, after a long calm.
        ([2.0, 2.02] * 15 + [2.1, 2.3, 2.2, 2.9, 3.4, 4.4, 5.5], GROWTH),
        # A decaying loss, a flat one, one that swings and stays, one that swings less and less.
        ([10 / (1 + i) for i in range(50)], None),
        ([1.0] * 50, None),
        ([1.0, 2.0] * 20, None),
        ([1 + (-0.9) ** i for i in range(40)], None),
        # Below zero the same.
        ([-2.0, -2.1, -2.0, -2.1, -1.8, -1.2, 0.2, 3.0], GROWTH),
    ],
)
def test_pattern_of_a_series_is_named_or_none(losses, expected):
    """S2."""
    assert name(losses) == expected


def test_pattern_says_how_long_it_took_and_from_where_to_where():
    found = loss_pattern([2.1, 2.2, 2.5, 3.1, 4.8, 9.2, 23.5, 156.7, NAN])
    assert (found.steps, found.text) == (7, "the loss grew for 7 steps, from 2.1 to 156.7")


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_noise_has_no_pattern(noise):
    """At most 2 series in 100 of independent noise: asked at an incident only, none does harm."""
    draw = random.Random(0).gauss
    named = [name([2 * math.exp(draw(0, noise)) for _ in range(40)]) for _ in range(1000)]
    assert sum(each is not None for each in named) <= 20
