"""The precision policy, driven by hand."""

import random

import pytest

from lit_stability.policies.precision import PrecisionPolicy, lower_precisions


def escalation(home="16-mixed", levels=("bf16-mixed", "32-true"), wait=3, failures=2):
    return PrecisionPolicy(home, levels, wait=wait, failures=failures)


@pytest.mark.parametrize(
    ("home", "levels"),
    [
        ("16-mixed", ("bf16-mixed", "32-true")),
        ("bf16-mixed", ("32-true",)),
        ("16-true", ("bf16-mixed", "32-true")),
        ("32-true", ()),
        ("64-true", ()),
    ],
)
def test_default_levels_hold_more_numbers_than_home(home, levels):
    assert lower_precisions(home) == levels


def test_it_goes_down_a_level_at_a_time_to_the_last():
    it = escalation()
    assert [it.down(), it.down(), it.next] == ["bf16-mixed", "32-true", None]


def test_calm_brings_it_up_a_level_at_a_time():
    it = escalation()
    it.down(), it.down()
    assert [it.healthy() for _ in range(7)] == [
        None, None, "bf16-mixed", None, None, "16-mixed", None,
    ]  # fmt: skip


def test_failed_try_doubles_the_wait_and_the_last_is_the_end():
    it, tries = escalation(), []
    it.down()
    for step in range(60):
        if it.healthy() is not None:
            tries.append(step)
            it.down()
    assert tries == [2, 8]


def test_overflow_long_after_a_try_is_no_failure_of_it():
    it = escalation(failures=1)
    it.down()
    assert [it.healthy() for _ in range(3)][-1] == "16-mixed"
    for _ in range(4):
        it.healthy()
    it.down()
    assert [it.healthy() for _ in range(3)][-1] == "16-mixed"


def test_trouble_restarts_the_count():
    it = escalation()
    it.down()
    it.healthy(), it.healthy()
    it.disturbed()
    assert [it.healthy() for _ in range(3)] == [None, None, "16-mixed"]


@pytest.mark.parametrize("home", ["16-true", "bf16-true"])
def test_it_never_goes_back_to_half_precision_weights(home):
    it = escalation(home)
    it.down(), it.down()
    seen = {it.healthy() for _ in range(50)} - {None}
    assert seen == {"bf16-mixed"}


@pytest.mark.parametrize("seed", range(20))
def test_however_the_run_behaves_the_ways_down_are_bounded(seed):
    """Invariant 4."""
    choose = random.Random(seed)
    it, down, tries = escalation(wait=choose.randint(1, 5)), 0, 0
    for _ in range(3000):
        if choose.random() < 0.3:
            it.disturbed()
            if it.next is not None and choose.random() < 0.9:
                it.down()
                down += 1
        elif it.healthy() is not None:
            tries += 1
    assert down <= 2 + tries


def test_state_survives_a_round_trip_and_that_of_another_run_is_refused():
    it, other = escalation(), escalation()
    it.down()
    it.healthy(), it.healthy()
    assert other.load_state_dict(it.state_dict())
    assert other.healthy() == "16-mixed"
    assert not escalation("bf16-true").load_state_dict(it.state_dict())
