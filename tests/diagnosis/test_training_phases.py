"""Phases of a run, by learning rate and loss, and the norms of each."""

import copy
import math
import random
from itertools import pairwise

import pytest

from lit_stability.diagnosis.training_phases import PhaseRanges


def feed(ranges, losses, rates, norms=None):
    """The phase of each step."""
    phases = []
    for step, (loss, rate) in enumerate(zip(losses, rates, strict=True)):
        ranges.update(step, loss, 1.0 if norms is None else norms[step], rate)
        phases.append(ranges.phase)
    return phases


def small():
    return PhaseRanges(stable_after=5, block=10, patience=3)


def falling(steps):
    return [10 * 0.99**step for step in range(steps)]


def warm_up(steps, of):
    return [min(1.0, (step + 1) / of) for step in range(steps)]


def boundaries(phases):
    """Where each phase begins, after the first step."""
    return [(i, b) for i, (a, b) in enumerate(pairwise(phases), 1) if a != b]


STREAMS = {
    "constant rate": (falling(100), [1.0] * 100, []),
    "falling rate": (falling(100), [0.99**i for i in range(100)], []),
    "warm-up": (falling(100), warm_up(100, 20), [(1, "warm-up"), (24, "descent")]),
    "restart to the old peak": (
        falling(60),
        warm_up(30, 20) * 2,
        [(1, "warm-up"), (24, "descent")],
    ),
    "plateau": ([1.0] * 60, [1.0] * 60, [(39, "plateau")]),
    "plateau that ends": ([1.0] * 60 + [0.5] * 20, [1.0] * 80, [(39, "plateau"), (69, "descent")]),
    "slow fall": ([0.999**i for i in range(300)], [1.0] * 300, []),
    "rise from a plateau": ([1.0] * 60, [1.0] * 50 + [2.0] * 10, None),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_phases_begin_where_rate_and_loss_say(stream):
    """V3."""
    losses, rates, expected = STREAMS[stream]
    found = boundaries(feed(small(), losses, rates))
    if expected is None:
        expected = [(39, "plateau"), (50, "warm-up"), (55, "plateau")]
    assert found == expected


def test_ranges_are_the_quantiles_of_each_phase():
    """V3: nine in ten of the norms, to 2.5 %."""
    rng = random.Random(0)
    norms = [math.exp(rng.gauss(math.log(3.0 if i < 500 else 0.3), 0.2)) for i in range(1000)]
    ranges = PhaseRanges(stable_after=1)
    rates = [float(i) if i < 500 else 499.0 for i in range(1000)]
    feed(ranges, falling(1000), rates, norms)
    first, second = ranges.ranges()
    assert (first.phase, second.phase) == ("warm-up", "descent")
    assert (first.first_step, first.last_step, second.last_step) == (1, 499, 999)
    assert first.steps + second.steps == 999
    for found, part in ((first, norms[1:500]), (second, norms[500:])):
        part = sorted(part)
        assert found.low == pytest.approx(part[len(part) // 20], rel=0.03)
        assert found.middle == pytest.approx(part[len(part) // 2], rel=0.03)
        assert found.high == pytest.approx(part[-len(part) // 20], rel=0.03)


def test_steps_that_are_not_finite_teach_nothing():
    ranges = small()
    feed(ranges, [1.0] * 20, [1.0] * 20)
    before = copy.deepcopy(ranges.state_dict())
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)):
        ranges.update(20, loss, norm, 2.0)
    assert ranges.state_dict() == before


def test_norm_of_zero_has_its_place():
    ranges = small()
    feed(ranges, [1.0] * 11, [1.0] * 11, [0.0] * 11)
    (found,) = ranges.ranges()
    assert (found.low, found.high) == (0.0, 0.0)


def test_state_goes_on_where_it_was():
    losses, rates = falling(80), warm_up(80, 20)
    whole, first, second = small(), small(), small()
    feed(whole, losses, rates)
    feed(first, losses[:33], rates[:33])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(33, 80):
        second.update(step, losses[step], 1.0, rates[step])
    assert second.state_dict() == whole.state_dict()


def test_memory_is_bounded_over_many_steps():
    ranges = PhaseRanges()
    rng = random.Random(0)
    for step in range(100_000):
        ranges.update(step, 1.0, 10 ** rng.uniform(-30, 30), 1.0)
    assert sum(each.steps for each in ranges.ranges()) == 99_999
    assert sum(len(t["bins"]) for t in ranges.state_dict()["tallies"].values()) < 6000


@pytest.mark.parametrize("option", ["stable_after", "block", "patience"])
def test_option_below_one_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        PhaseRanges(**{option: 0})
