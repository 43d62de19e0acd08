import math

import pytest

from lit_stability.policies.backoff import Backoff, Baseline


def calm_steps(backoff, count, nominal=(1.0,)):
    """Counts calm steps; returns what was relaxed."""
    relaxed = [backoff.healthy_step(0, nominal) for _ in range(count)]
    return [r for r in relaxed if r]


def test_cut_is_relaxed_by_doubling_until_it_is_gone():
    backoff = Backoff(relax_after=20)
    backoff.cut(0.2, 0.5)
    factors = []
    for _ in range(70):
        backoff.healthy_step(0, [1.0])
        factors.append((backoff.lr_factor, backoff.clip_factor))
    assert factors[18] == (0.2, 0.5)
    assert factors[19] == (0.4, 1.0)
    assert factors[39] == (0.8, 1.0)
    assert factors[59:] == [(1.0, 1.0)] * 11
    assert not backoff.active


def test_cuts_multiply_and_a_disturbance_restarts_the_wait():
    backoff = Backoff(relax_after=10)
    backoff.cut(0.5, 0.5)
    backoff.cut(0.5, 0.5)
    assert (backoff.lr_factor, backoff.clip_factor) == (0.25, 0.25)
    calm_steps(backoff, 9)
    backoff.disturbed()
    calm_steps(backoff, 9)
    assert backoff.lr_factor == 0.25
    assert calm_steps(backoff, 1) == ["learning rate x0.5, clip x0.5"]


def test_cuts_of_one_incident_are_put_back_and_those_before_it_stay():
    backoff = Backoff(relax_after=10)
    assert not backoff.undo_cuts()
    backoff.cut(0.25, 0.5)
    backoff.remember()
    backoff.cut(0.5, 0.5, lasting=True)
    backoff.cut(0.5, 0.5)
    assert backoff.undo_cuts()
    assert (backoff.lr_factor, backoff.clip_factor, backoff.patience) == (0.25, 0.5, 1)
    assert not backoff.undo_cuts()


def test_put_back_takes_nothing_of_what_was_relaxed():
    backoff = Backoff(relax_after=10)
    backoff.cut(0.5, 0.5)
    backoff.remember()
    calm_steps(backoff, 10)
    assert not backoff.undo_cuts()
    assert not backoff.active


def test_cut_that_follows_a_relaxation_waits_four_times_as_long():
    """A rate that is too high comes back as too high each time it is restored."""
    backoff = Backoff(relax_after=10)
    waits = []
    for _ in range(3):
        backoff.cut(0.5, 0.5)
        waits.append(next(i for i in range(1, 999) if backoff.healthy_step(0, [1.0])))
    assert waits == [10, 40, 160]


def test_long_calm_at_full_rate_forgets_the_longer_wait():
    backoff = Backoff(relax_after=10)
    for _ in range(2):
        backoff.cut(0.5, 0.5)
        calm_steps(backoff, 40)
    assert backoff.patience == 4
    calm_steps(backoff, 400)
    backoff.cut(0.5, 0.5)
    assert backoff.patience == 1


def test_lasting_cut_is_relaxed_sixteen_times_later():
    backoff = Backoff(relax_after=10)
    backoff.cut(0.5, 0.5, lasting=True)
    assert calm_steps(backoff, 159) == []
    assert calm_steps(backoff, 1) == ["learning rate and clip are back to normal"]


def test_hold_stays_while_the_schedule_stays_up_and_goes_when_it_comes_back():
    backoff = Backoff(relax_after=10)
    backoff.hold(0, [0.01])
    decaying = [0.3 * 0.99**i for i in range(1000)]
    assert [backoff.healthy_step(0, [lr]) for lr in decaying] == [None] * 1000
    assert backoff.factors(0, 1) == [0.01]
    assert calm_steps(backoff, 1, nominal=[1e-7]) == ["the learning rate is no longer held"]
    assert backoff.factors(0, 1) == [1.0]


def test_holds_and_cuts_multiply_group_by_group():
    backoff = Backoff(relax_after=10)
    backoff.hold(0, [0.1, 1.0])
    backoff.hold(0, [0.5, 0.5])
    backoff.cut(0.5, 1.0)
    assert backoff.factors(0, 2) == [0.025, 0.25]
    assert backoff.factors(1, 3) == [0.5, 0.5, 0.5]


def test_state_round_trip_keeps_what_is_in_force():
    backoff, fresh = Backoff(relax_after=10), Backoff(relax_after=10)
    backoff.cut(0.5, 0.25, lasting=True)
    backoff.hold(1, [0.1, 0.5])
    fresh.load_state_dict(backoff.state_dict())
    assert (fresh.lr_factor, fresh.clip_factor, fresh.patience) == (0.5, 0.25, 16)
    assert fresh.holds == {1: (0.1, 0.5)}


def test_wait_below_one_is_refused_with_its_value():
    with pytest.raises(ValueError, match="relax_after must be at least 1, got 0"):
        Backoff(relax_after=0)


def test_clip_threshold_is_a_share_of_twice_the_median_norm():
    baseline = Baseline()
    assert baseline.clip_threshold(0.5) is None, "nothing is known yet"
    for norm in (1.0, 2.0, 3.0):
        baseline.add(norm, None)
    assert baseline.clip_threshold(0.5) == 2.0
    assert baseline.clip_threshold(0.25) == 1.0
    assert baseline.clip_threshold(1.0) is None, "no clipping in normal running"


def test_excess_compares_an_update_with_its_median():
    baseline = Baseline(min_history=3)
    assert baseline.excess(5.0) == 1.0
    for _ in range(3):
        baseline.add(1.0, 0.01)
    assert baseline.excess(0.3) == pytest.approx(30.0)
    assert baseline.excess(0.001) == 1.0
    assert baseline.excess(None) == 1.0


def test_cut_limits_a_rising_schedule_to_the_share_of_where_it_failed():
    backoff = Backoff(relax_after=10)
    backoff.cut(0.5, 0.5, failed_at={0: [0.8, 0.0], 1: [0.2]})
    assert backoff.limits_of(0, 2) == (0.4, math.inf)
    assert backoff.limits_of(1, 1) == (0.1,)
    assert backoff.limits_of(0, 3) is None  # a group was added since
    backoff.cut(0.5, 0.5, failed_at={0: [0.4, 0.0], 1: [0.1]})
    assert backoff.limits_of(0, 2) == (0.2, math.inf)


def test_rollback_that_cuts_no_learning_rate_limits_none():
    backoff = Backoff(relax_after=10)
    backoff.cut(1.0, 1.0, failed_at={0: [0.8]})
    assert backoff.limits_of(0, 1) is None
    assert not backoff.active


def test_limit_is_doubled_until_it_is_above_the_schedule():
    backoff = Backoff(relax_after=10)
    backoff.cut(0.5, 0.5, failed_at={0: [0.8]})
    assert calm_steps(backoff, 40, nominal=[3.0]) == [
        "learning rate at most 0.8",
        "learning rate at most 1.6",
        "learning rate and clip are back to normal",
    ]
    assert not backoff.active


def test_limits_are_saved_and_put_back_with_the_cuts_of_an_incident():
    backoff = Backoff(relax_after=10)
    backoff.cut(0.5, 0.5, failed_at={0: [0.8]})
    resumed = Backoff(relax_after=10)
    resumed.load_state_dict(backoff.state_dict())
    assert resumed.limits_of(0, 1) == (0.4,)
    resumed.remember()
    resumed.cut(0.5, 0.5, failed_at={0: [0.4], 1: [0.1]})
    assert resumed.undo_cuts()
    assert (resumed.limits_of(0, 1), resumed.limits_of(1, 1)) == ((0.4,), None)
