"""States of the generators, as they are taken between any draws."""

import numpy as np
import pytest

from lit_stability.training_state.rng import capture_rng, restore_rng


@pytest.fixture(autouse=True)
def generators_afterwards():
    kept = np.random.get_bit_generator(), np.random.get_state()
    yield
    np.random.set_bit_generator(kept[0])
    np.random.set_state(kept[1])


DRAWS = {
    "nothing": lambda: None,
    "uniform": np.random.rand,
    "one Gaussian number, the second in store": np.random.randn,
    "both": lambda: np.random.randn(2),
    "whole numbers": lambda: np.random.randint(10),
    "half a word": lambda: np.random.randint(2, dtype=np.uint8),
    "a new seed": lambda: np.random.seed(3),
    "a permutation": lambda: np.random.permutation(1000),
}


@pytest.mark.parametrize("second", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("first", DRAWS.values(), ids=DRAWS)
def test_numpys_state_is_that_of_the_moment_whatever_was_drawn(first, second):
    """Between two captures that look alike, too: what was read last may not serve then."""
    np.random.seed(0)
    for draw in (first, second, second):
        draw()
        captured, expected = capture_rng()["numpy"], np.random.get_state()
        assert captured[2:] == expected[2:]
        assert np.array_equal(captured[1], expected[1])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_is_drawn_after_a_restore_is_what_was_drawn_before(draw):
    np.random.seed(0)
    draw()
    state = capture_rng()
    stream = [np.random.randn() for _ in range(5)]
    capture_rng()
    restore_rng(state)
    assert [np.random.randn() for _ in range(5)] == stream


def test_a_state_that_was_captured_stays_as_it_was():
    np.random.seed(0)
    state = capture_rng()["numpy"]
    words = state[1].copy()
    np.random.rand(2000)
    capture_rng()
    assert np.array_equal(state[1], words)


def test_another_generator_is_read_by_its_own_rules():
    np.random.set_bit_generator(np.random.PCG64(1))
    state = capture_rng()
    drawn = np.random.rand(3).tolist()
    restore_rng(state)
    assert np.random.rand(3).tolist() == drawn
