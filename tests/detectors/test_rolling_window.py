"""A window's statistics against those of the same values, sorted each time."""

import random
from collections import deque
from statistics import median

import pytest

from lit_stability.detectors.rolling_window import Window


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_statistics_of_a_long_stream_are_those_of_its_last_values(size):
    """Values that repeat leave one by one; what is not finite never enters."""
    draw, window, kept = random.Random(size), Window(size), deque(maxlen=size)
    for _ in range(400):
        value = draw.choice((float(draw.randrange(4)), draw.gauss(0, 1), float("nan")))
        window.add(value)
        kept += [value] if value == value else []
        if not kept:
            continue
        centre = median(kept)
        assert window.median == centre
        assert window.sigma == pytest.approx(1.4826 * median(abs(v - centre) for v in kept))


def test_values_that_are_put_back_take_the_place_of_all_others():
    window = Window(3)
    for value in (5.0, 6.0, 7.0):
        window.add(value)
    assert window.median == 6.0
    window.replace([1.0, 3.0, 2.0])
    window.add(4.0)
    assert (window.median, list(window.values)) == (3.0, [3.0, 2.0, 4.0])


@pytest.mark.parametrize("turn", [0.0, 0.05, -0.3])
def test_spread_of_noise_about_a_bent_line_is_that_of_the_noise(turn):
    draw, window, level = random.Random(0), Window(99), Window(99)
    for i in range(99):
        noise = draw.gauss(0, 1)
        level.add(noise)
        window.add(noise - 0.2 * i + turn * max(0, i - 49))
    assert window.spread == pytest.approx(level.sigma, rel=0.15)
    assert window.sigma > 3 * window.spread


def test_spread_of_what_jumps_to_and_fro_is_no_trend():
    window = Window(100)
    for i in range(100):
        window.add(float(i // 10 % 2))
    assert window.spread == pytest.approx(window.sigma, rel=0.2)


def test_spread_of_a_few_values_is_their_deviation():
    window = Window(100)
    for value in range(8):
        window.add(float(value))
    assert window.spread == window.sigma > 0
