"""The risk on sequences with known answers, and the state machine that answers it."""

import json
import math
import random
from itertools import pairwise

import pytest

from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.crash_risk import CrashRisk, Prevention, RiskLevels, risk_of
from lit_stability.policies.crash_risk.lr_cap import LearningRateCap
from lit_stability.policies.crash_risk.model import CALIBRATION
from lit_stability.policies.crash_risk.trends import FEATURES

JUMP = [1.8, 1.7, 1.6, 1.5, 1.4, 87234.5]
EXPONENTIAL = [2.1, 2.2, 2.5, 3.1, 4.8, 9.2, 23.5, 156.7]
OSCILLATING = [2.0, 1.8, 2.2, 1.6, 2.5, 1.4, 3.2, 1.2, 5.8]


def stats(loss, norm=1.0, ratio=None, rate=0.1, step=0):
    return StepStats(
        step=step,
        loss=loss,
        grad_norm=norm,
        update_ratio=ratio,
        update_learning_rate=rate,
        learning_rates=(rate,),
    )


def calm(level, steps=60, noise=0.02, seed=0):
    r = random.Random(seed)
    return [level * (1 + r.gauss(0, noise)) for _ in range(steps)]


def risks(losses, risk=None):
    """The risk after each step, with a gradient norm that goes with the loss."""
    risk = risk or CrashRisk()
    return [risk.update(stats(loss, abs(loss))) for loss in losses]


@pytest.mark.parametrize(
    ("sequence", "steps_to_nan"),
    [(EXPONENTIAL, 4), (OSCILLATING, 1)],
    ids=["exponential growth", "oscillating divergence"],
)
def test_risk_of_a_printed_divergence_passes_half_before_the_nan(sequence, steps_to_nan):
    """S16, S2: the sequences B and C after calm steps; the NaN comes next in both."""
    found = risks([*calm(sequence[0]), *sequence])
    assert max(found[:60]) < 0.1
    over = [i for i, value in enumerate(found) if value >= 0.5]
    assert len(found) - over[0] == steps_to_nan
    assert found[-1] == max(found)


def test_risk_of_a_jump_is_not_predicted_as_it_gives_no_notice():
    """S16, S2: the sequence A; nothing in the losses before tells of 87234.5."""
    assert max(risks([*calm(1.8), *JUMP])) < 0.1


def test_risk_of_a_calm_noisy_decay_stays_low():
    """S16."""
    r = random.Random(1)
    losses = [3 * (i + 5) ** -0.3 * (1 + r.gauss(0, 0.1)) for i in range(1000)]
    assert max(risks(losses)) < 0.1


@pytest.mark.parametrize("spike", [1e3, 1e30, math.nan, math.inf, -math.inf])
def test_risk_after_one_spike_is_that_of_a_calm_run(spike):
    """One outlier is no trend, whatever it is."""
    found = risks([*calm(2.0), spike, *calm(2.0, seed=1)])
    assert max(found) < 0.1


def test_risk_after_nan_and_inf_everywhere_still_sees_a_divergence():
    risk = CrashRisk()
    for bad in (math.nan, math.inf, 0.0):
        risk.update(stats(bad or math.nan, bad, bad, rate=bad))
    assert risks([*calm(2.1), *EXPONENTIAL], risk)[-1] > 0.5


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_risk_is_the_same_in_any_unit_of_the_loss(scale):
    """It carries over between models."""
    losses = [*calm(2.1), *EXPONENTIAL]
    assert risks([scale * x for x in losses]) == pytest.approx(risks(losses), rel=1e-6)


def test_risk_is_zero_without_a_history_and_where_the_loss_has_no_logarithm():
    assert set(risks(EXPONENTIAL)) == {0.0}
    assert risks([*calm(2.0), *calm(-2.0, 30)])[-1] == 0.0


def test_risk_of_losses_from_a_state_that_was_saved_goes_on_as_before():
    losses = [*calm(2.1), *EXPONENTIAL]
    whole, first, second = CrashRisk(), CrashRisk(), CrashRisk()
    expected = risks(losses, whole)
    risks(losses[:64], first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value
    assert risks(losses[64:], second) == expected[64:]
    assert second.in_words() == whole.in_words()


def test_risk_memory_is_bounded():
    risk = CrashRisk()
    risks(calm(2.0, 300), risk)
    size = len(json.dumps(risk.state_dict()))
    risks(calm(2.0, 3000), risk)
    assert len(json.dumps(risk.state_dict())) < 1.1 * size


def test_risk_in_words_names_the_two_trends_that_say_most():
    risk = CrashRisk()
    risks([*calm(2.1), *EXPONENTIAL], risk)
    assert "within 20 steps (loss 11" in risk.in_words()


def test_risk_rises_with_every_feature_and_so_does_the_calibration():
    middle = [0.5, -1.0, 0.5, 0.5, 0.5]
    for i in range(len(FEATURES)):
        more = [f + (i == j) for j, f in enumerate(middle)]
        assert risk_of(more) > risk_of(middle)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(CALIBRATION))


def test_risk_of_the_wrong_number_of_features_is_refused():
    with pytest.raises(ValueError, match=r"must be 5 numbers, got \[1.0\]"):
        risk_of([1.0])


RATES = {0: [1.0]}


def driven(risks, rates=RATES, **options):
    """The responses due at each step, and the machine."""
    prevention = Prevention(RiskLevels(stop=0.9), **options)
    return [prevention.step(risk, rates).due for risk in risks], prevention


@pytest.mark.parametrize(
    ("risks", "due"),
    [
        ([0.29], [()]),
        ([0.3, 0.3], [("save",), ()]),
        ([0.5], [("save", "slow")]),
        ([0.3, 0.7, 0.7], [("save",), ("slow", "precision"), ()]),
        ([0.95], [("save", "slow", "precision", "stop")]),
        ([0.3, 0.0, 0.3], [("save",), (), ()]),
        ([0.3, 0.0, 0.0, 0.3], [("save",), (), (), ("save",)]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [("save", "slow"), (), ("slow",), (), ("slow",)]),
    ],
)
def test_prevention_answers_by_degrees_and_once_an_episode(risks, due):
    """S16; an episode of these ends after two calm steps."""
    assert driven(risks, horizon=2)[0] == due


def test_prevention_by_default_never_stops():
    prevention = Prevention(RiskLevels())
    assert prevention.step(1.0, RATES).due == ("save", "slow", "precision")


def test_prevention_binds_the_rate_and_lets_it_up_by_degrees():
    _, prevention = driven([0.6], relax_after=3, horizon=2)
    factors = []
    for _ in range(8):
        prevention.step(0.0, RATES)
        factors.append((prevention.factors(RATES)[0][0], prevention.clip_factor))
    half, more, whole = (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)
    assert factors == [half, half, more, more, more, whole, whole, whole]


def test_prevention_of_a_returning_risk_waits_longer_each_time():
    """However often the risk returns, the cuts become rare: their number is bounded."""
    prevention, cuts = Prevention(RiskLevels(), horizon=1, relax_after=2), []
    for step in range(400):
        # Whatever is bound to less than nine tenths lives, what is not is in danger.
        risk = 0.0 if prevention.factors(RATES)[0][0] < 0.9 else 0.6
        if "slow" in prevention.step(risk, RATES).due:
            cuts.append(step)
    gaps = [b - a for a, b in pairwise(cuts)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 10
    assert gaps[-1] > 60


def test_prevention_under_a_constant_alarm_stops_cutting_at_a_64th():
    due, prevention = driven([0.6] * 200, horizon=2)
    assert sum("slow" in each for each in due) == 6
    assert prevention.factors(RATES)[0] == (1 / 64,)


def test_prevention_state_round_trip_goes_on_as_before():
    risks = [0.6, 0.0, 0.0, 0.6, 0.0] * 10
    _, whole = driven(risks, horizon=2, relax_after=2)
    _, first = driven(risks[:23], horizon=2, relax_after=2)
    second = Prevention(RiskLevels(stop=0.9), horizon=2, relax_after=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for risk in risks[23:]:
        second.step(risk, RATES)
    assert second.state_dict() == whole.state_dict()


def test_lr_cap_holds_a_schedule_that_climbs_and_lets_one_fall():
    lr_cap = LearningRateCap()
    lr_cap.lower({0: [1.0, 0.1]})
    for scheduled, expected in (([4.0, 0.4], [0.5, 0.05]), ([0.2, 0.02], [0.2, 0.02])):
        factors = lr_cap.factors({0: scheduled})[0]
        effective = [r * f for r, f in zip(scheduled, factors, strict=True)]
        assert effective == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": 0.0}, "save must be in \\(0, 1\\], or None, got 0.0"),
        ({"stop": 1.5}, "stop must be in \\(0, 1\\], or None, got 1.5"),
        ({"save": math.nan}, "save must be in"),
        ({"slow": 0.2}, "slow must be at least the previous level, 0.3, got 0.2"),
    ],
)
def test_risk_levels_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RiskLevels(**options)


def test_risk_levels_of_none_ask_for_nothing():
    levels = RiskLevels(save=None, slow=None, precision=None)
    assert levels.reached(1.0) == ()
