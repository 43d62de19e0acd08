import pytest

from lit_stability.policies.backoff import Baseline, Throttle


def calm_steps(throttle, count, nominal=(1.0,)):
    """Drive it through calm steps; the factors after each, and what it said."""
    said = [throttle.calm(0, nominal) for _ in range(count)]
    return [s for s in said if s]


def test_cut_is_relaxed_by_doubling_until_it_is_gone():
    throttle = Throttle(relax_after=20)
    throttle.cut(0.2, 0.5)
    factors = []
    for _ in range(70):
        throttle.calm(0, [1.0])
        factors.append((throttle.lr_factor, throttle.clip_factor))
    assert factors[18] == (0.2, 0.5)
    assert factors[19] == (0.4, 1.0)
    assert factors[39] == (0.8, 1.0)
    assert factors[59:] == [(1.0, 1.0)] * 11
    assert not throttle.active


def test_cuts_multiply_and_a_disturbance_starts_the_wait_anew():
    throttle = Throttle(relax_after=10)
    throttle.cut(0.5, 0.5)
    throttle.cut(0.5, 0.5)
    assert (throttle.lr_factor, throttle.clip_factor) == (0.25, 0.25)
    calm_steps(throttle, 9)
    throttle.disturbed()
    calm_steps(throttle, 9)
    assert throttle.lr_factor == 0.25
    assert calm_steps(throttle, 1) == ["learning rate x0.5, clip x0.5"]


def test_cuts_of_one_incident_are_put_back_and_those_before_it_stay():
    throttle = Throttle(relax_after=10)
    assert not throttle.put_back()
    throttle.cut(0.25, 0.5)
    throttle.remember()
    throttle.cut(0.5, 0.5, lasting=True)
    throttle.cut(0.5, 0.5)
    assert throttle.put_back()
    assert (throttle.lr_factor, throttle.clip_factor, throttle.patience) == (0.25, 0.5, 1)
    assert not throttle.put_back()


def test_put_back_takes_nothing_of_what_was_relaxed():
    throttle = Throttle(relax_after=10)
    throttle.cut(0.5, 0.5)
    throttle.remember()
    calm_steps(throttle, 10)
    assert not throttle.put_back()
    assert not throttle.active


def test_cut_that_follows_a_relaxation_waits_four_times_as_long():
    """A rate that is too high comes back as too high each time it is restored."""
    throttle = Throttle(relax_after=10)
    waits = []
    for _ in range(3):
        throttle.cut(0.5, 0.5)
        waits.append(next(i for i in range(1, 999) if throttle.calm(0, [1.0])))
    assert waits == [10, 40, 160]


def test_long_calm_at_full_rate_forgets_the_longer_wait():
    throttle = Throttle(relax_after=10)
    for _ in range(2):
        throttle.cut(0.5, 0.5)
        calm_steps(throttle, 40)
    assert throttle.patience == 4
    calm_steps(throttle, 400)
    throttle.cut(0.5, 0.5)
    assert throttle.patience == 1


def test_lasting_cut_is_relaxed_sixteen_times_later():
    throttle = Throttle(relax_after=10)
    throttle.cut(0.5, 0.5, lasting=True)
    assert calm_steps(throttle, 159) == []
    assert calm_steps(throttle, 1) == ["learning rate and clip are back to normal"]


def test_hold_stays_while_the_schedule_stays_up_and_goes_when_it_comes_back():
    throttle = Throttle(relax_after=10)
    throttle.hold(0, [0.01])
    decaying = [0.3 * 0.99**i for i in range(1000)]
    assert [throttle.calm(0, [lr]) for lr in decaying] == [None] * 1000
    assert throttle.factors(0, 1) == [0.01]
    assert calm_steps(throttle, 1, nominal=[1e-7]) == ["the learning rate is no longer held"]
    assert throttle.factors(0, 1) == [1.0]


def test_holds_and_cuts_multiply_group_by_group():
    throttle = Throttle(relax_after=10)
    throttle.hold(0, [0.1, 1.0])
    throttle.hold(0, [0.5, 0.5])
    throttle.cut(0.5, 1.0)
    assert throttle.factors(0, 2) == [0.025, 0.25]
    assert throttle.factors(1, 3) == [0.5, 0.5, 0.5]


def test_state_round_trip_keeps_what_is_in_force():
    throttle, fresh = Throttle(relax_after=10), Throttle(relax_after=10)
    throttle.cut(0.5, 0.25, lasting=True)
    throttle.hold(1, [0.1, 0.5])
    fresh.load_state_dict(throttle.state_dict())
    assert (fresh.lr_factor, fresh.clip_factor, fresh.patience) == (0.5, 0.25, 16)
    assert fresh.holds == {1: (0.1, 0.5)}


def test_wait_below_one_is_refused_with_its_value():
    with pytest.raises(ValueError, match="relax_after must be at least 1, got 0"):
        Throttle(relax_after=0)


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
