"""When a run learns again after an incident."""

import random

import pytest

from lit_stability.incidents.learning import Level, LossLevels


def around(middle, count, spread=0.05):
    """Losses that vary as those of small batches do."""
    numbers = random.Random(str(middle))
    return [middle * (1 + numbers.uniform(-spread, spread)) for _ in range(count)]


FALLING = [2.3 * 0.98**step for step in range(60)]
CHANCE = around(2.3, 60)
SOLVED = around(1e-6, 60, spread=0.9)
AGAIN = 12

CASES = {
    # losses before; losses after; whether learning rate or clip were lowered; whether it learns
    "a falling loss that goes on": (FALLING, [FALLING[-1]] * AGAIN, False, True),
    "a falling loss that goes on with a lower rate": (FALLING, [FALLING[-1]] * AGAIN, True, True),
    "a loss that has gone up for good": (FALLING, [2.2] * AGAIN, False, False),
    "a loss at its floor": (around(0.1, 60), around(0.1, AGAIN), False, True),
    "a loss of almost 0 that varies": (SOLVED, SOLVED[:AGAIN], False, True),
    "chance level, nothing lowered": (CHANCE, around(2.3, AGAIN), False, True),
    "chance level with a lower rate": (CHANCE, around(2.3, AGAIN), True, False),
    "the first step of all, nothing lowered": ([], [2.3] * AGAIN, False, True),
    "the first step of all with a lower rate": ([], [2.3] * AGAIN, True, False),
}


@pytest.mark.parametrize("name", CASES)
def test_run_learns_again_if_its_loss_is_back_and_not_that_of_its_start(name):
    before, after, lowered, expected = CASES[name]
    levels = LossLevels(from_start=True)
    for step, loss in enumerate(before):
        levels.add(step, loss)
    level = levels.now
    for step, loss in enumerate(after, len(before)):
        levels.add(step, loss)
    assert levels.learns(levels.since(len(before)), level, lowered=lowered) is expected


def test_rate_that_is_cut_to_nothing_learns_nothing_whatever_the_loss():
    levels = LossLevels(from_start=True)
    for step, loss in enumerate(FALLING):
        levels.add(step, loss)
    levels.add(60, FALLING[-1])
    levels.rate_is_cut = True
    assert not levels.learns(levels.since(60), levels.now, lowered=True)
    levels.rate_is_cut = False
    assert levels.learns(levels.since(60), levels.now, lowered=True)


def test_resumed_run_may_have_learnt_before():
    levels = LossLevels(from_start=False)
    for step, loss in enumerate(CHANCE, 1000):
        levels.add(step, loss)
    assert levels.start is None
    assert levels.learns(levels.now, levels.now, lowered=True)


def test_losses_that_are_not_finite_do_not_count():
    assert Level.of([float("inf"), float("nan")]) is None
    levels = LossLevels(from_start=True)
    levels.add(0, float("inf"))
    assert levels.learns(levels.now, None, lowered=True), "nothing is known"
