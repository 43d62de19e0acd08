"""States of the generators, as they are taken between any draws."""

import random

import numpy as np
import pytest
import torch

from lit_stability.training_state import rng
from lit_stability.training_state.rng import (
    capture_rng,
    fresh_rng,
    pack_rng,
    restore_rng,
    same_rng,
    unpack_rng,
)


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


PYTHON_DRAWS = {
    "nothing": lambda: None,
    "uniform": random.random,
    "one Gaussian number, the second in store": lambda: random.gauss(0, 1),
    "whole numbers": lambda: random.randrange(10),
    "a new seed": lambda: random.seed(3),
    "a permutation": lambda: random.shuffle([*range(1000)]),
}


@pytest.mark.parametrize("second", PYTHON_DRAWS.values(), ids=PYTHON_DRAWS)
@pytest.mark.parametrize("first", PYTHON_DRAWS.values(), ids=PYTHON_DRAWS)
def test_pythons_state_is_that_of_the_moment_whatever_was_drawn(first, second):
    random.seed(0)
    for draw in (first, second, second):
        draw()
        assert capture_rng()["python"] == random.getstate()


def test_pythons_state_is_the_right_one_where_its_memory_cannot_be_read(monkeypatch):
    class Other(random.Random):
        pass

    monkeypatch.setattr(random, "getstate", Other(1).getstate)
    assert capture_rng()["python"] == random.getstate()


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


class Accelerator:
    """A kind of device with one generator."""

    def __init__(self, kind):
        self.kind = kind
        self.generator = torch.Generator()

    def states(self):
        return [self.generator.get_state()]

    def restore(self, states):
        self.generator.set_state(states[0])

    def draw(self):
        return torch.rand(1, generator=self.generator).item()


@pytest.fixture
def accelerator(monkeypatch):
    """A device in use beside the CPU, whose kind of generator is that of the CPU."""
    made = Accelerator("cpu")
    monkeypatch.setattr(rng, "_accelerator", lambda: made)
    return made


def test_generators_of_an_accelerator_are_restored_and_packed(accelerator):
    before = capture_rng()
    first = accelerator.draw()
    assert not same_rng(before, capture_rng())
    restore_rng(before)
    assert same_rng(before, capture_rng())
    assert accelerator.draw() == first
    restore_rng(unpack_rng(pack_rng(before)))
    assert accelerator.draw() == first


def test_state_of_0_1_0_restores_cuda_generators(accelerator):
    packed = pack_rng(capture_rng())
    packed["cuda"] = packed.pop("accelerator")
    first = accelerator.draw()
    restore_rng(unpack_rng(packed))
    assert accelerator.draw() == first


def test_state_with_another_number_of_accelerators_restores_the_host_only(accelerator):
    packed = pack_rng(capture_rng())
    packed["accelerator"] = packed["accelerator"] * 2
    first, on_host = accelerator.draw(), torch.rand(1)
    restore_rng(unpack_rng(packed))
    assert torch.rand(1) == on_host
    assert accelerator.draw() != first


def test_fresh_numbers_differ_on_an_accelerator_too(accelerator):
    before = capture_rng()
    first = accelerator.draw()
    restore_rng(fresh_rng(before))
    assert accelerator.draw() != first


def test_cuda_that_the_program_has_not_started_stays_so(monkeypatch):
    """Its start takes memory and forbids forks, as in a run on the CPU of a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("started CUDA"))
    assert capture_rng()["accelerator"] == []
