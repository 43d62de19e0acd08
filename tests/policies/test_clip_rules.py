"""Clipping rules: stream of norms in, thresholds out."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_stability.policies.clip_rules import (
    ClipRule,
    CutsLearningRate,
    FixedClip,
    MeanSigmaClip,
    PercentileClip,
    PerTensorClip,
    TieredClip,
    ZScoreClip,
)

NAN, INF = math.nan, math.inf
RULES = {
    "fixed": FixedClip(norm=0.75),
    "tiered": TieredClip(lr_steps=3),
    "percentile": PercentileClip(window=20, known_after=5, bounds=(0.01, 1e4)),
    "mean and sigma": MeanSigmaClip(window=20, known_after=5),
    "z-score": ZScoreClip(known_after=5),
}
NORMS = st.floats(allow_nan=True, allow_infinity=True)
EXTREME = [0.0, 5e-324, 1e-30, 1e30, 1e154, 1e200, 1.7e308, INF, NAN, -1.0]


@pytest.fixture(params=RULES)
def rule(request):
    return copy.deepcopy(RULES[request.param])


def noise(count, seed=0, sigma=0.2):
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(count)).tolist()


def feed(rule, norms):
    """The threshold before each norm, which is then learnt."""
    thresholds = []
    for norm in norms:
        thresholds.append(rule.threshold(norm))
        rule.update(norm)
    return thresholds


@pytest.mark.parametrize(
    ("norm", "threshold", "lr_factor"),
    [
        (0.76, 1.0, 1.0),
        (5.0, 1.0, 1.0),
        (5.01, 2.0, 1.0),
        (10.0, 2.0, 1.0),
        (10.01, 5.0, 0.5),
        (16.62, 5.0, 0.5),
        (INF, 5.0, 0.5),
        (NAN, 1.0, 1.0),
    ],
)
def test_tiers_have_known_answers(norm, threshold, lr_factor):
    """N2: above 10 clip to 5 and halve the learning rate, above 5 clip to 2, else to 1."""
    rule = TieredClip()
    assert (rule.threshold(norm), rule.lr_factor(norm)) == (threshold, lr_factor)
    assert rule.lr_factor() == 1.0, "asking changes nothing"


@pytest.mark.parametrize(
    ("norms", "factors"),
    [
        ([1, 20, 1, 1, 1, 1], [1, 0.5, 0.5, 0.5, 1, 1]),
        ([20, 1, 20, 1, 1, 1], [0.5, 0.5, 0.5, 0.5, 0.5, 1]),
        ([20, 1, 90, 1, 1, 1], [0.5, 0.5, 0.1, 0.1, 0.1, 1]),
        ([90, 1, 20, 1, 1, 1], [0.1, 0.1, 0.1, 0.1, 0.1, 1]),
        ([20, NAN, INF, 1, 1, 1], [0.5, 0.5, 0.1, 0.5, 0.5, 1]),
        ([7, 7, 7], [1, 1, 1]),
    ],
)
def test_cut_of_the_learning_rate_lasts_and_comes_back(norms, factors):
    """N2: for a while, and never deeper than its tier however often it recurs."""
    rule = TieredClip(tiers=((50.0, 5.0, 0.1), (10.0, 5.0, 0.5), (5.0, 2.0, 1.0)), lr_steps=3)
    seen = []
    for norm in norms:
        seen.append(rule.lr_factor(norm))
        rule.update(norm)
    assert seen == factors


@pytest.mark.parametrize("percentile", [1.0, 50.0, 90.0, 99.5, 100.0])
@pytest.mark.parametrize("window", [1, 7, 200])
def test_percentile_equals_that_of_numpy_over_the_last_norms(percentile, window):
    """S14: also once old norms have left, and where norms are equal; never between two norms."""
    norms = [round(norm, 1) for norm in noise(500)]
    rule = PercentileClip(
        percentile=percentile, window=window, bounds=(1e-9, 1e9), until_known=3.0, known_after=1
    )
    for i, threshold in enumerate(feed(rule, norms)):
        last = norms[max(0, i - window) : i]
        expected = np.percentile(last, percentile, method="lower") if last else 3.0
        assert threshold == expected


@pytest.mark.parametrize(
    ("norm", "threshold"), [(0.1, 1.0), (3.0, 3.0), (500.0, 100.0), (1e90, 100.0)]
)
def test_percentile_stays_within_bounds_and_is_ten_until_a_hundred_are_known(norm, threshold):
    """S14."""
    assert feed(PercentileClip(), [norm] * 102) == [10.0] * 100 + [threshold] * 2


def test_percentile_is_not_moved_by_five_spikes_in_a_thousand():
    """S14: but for the largest norm that was there before; the sixth shows."""
    norms = noise(1000)
    rule = PercentileClip(bounds=(0.1, 100.0))
    feed(rule, norms)
    feed(rule, [1e6] * 5)
    assert rule.threshold(1e6) <= max(norms)
    feed(rule, [1e6])
    assert rule.threshold(1e6) == 100.0


@pytest.mark.parametrize("window", [10, 1000])
def test_mean_and_sigma_equal_those_of_numpy_over_the_last_norms(window):
    """S14: norms none of which is beyond the threshold, so that all are learnt as they are."""
    norms = [2 + math.sin(i) for i in range(1200)]
    rule = MeanSigmaClip(window=window, known_after=10)
    for i, threshold in enumerate(feed(rule, norms)):
        last = norms[max(0, i - window) : i]
        expected = np.mean(last) + 3 * np.std(last) if i >= 10 else 10.0
        assert threshold == pytest.approx(expected, rel=1e-12)


def test_moving_moments_begin_as_mean_and_variance_and_go_on_as_averages():
    """ZClip, arXiv 2504.02507: the average of norms that are not clipped, and of their spread."""
    norms = [2 + math.sin(i) for i in range(100)]
    rule = ZScoreClip(known_after=25, z_max=4.0)
    feed(rule, norms[:25])
    assert rule.threshold(0.0) == pytest.approx(np.mean(norms[:25]) + 4 * np.std(norms[:25]))
    feed(rule, norms[25:])
    weights = np.array([0.97**75 / 25] * 25 + [0.03 * 0.97 ** (99 - i) for i in range(25, 100)])
    mean = weights @ norms
    sigma = math.sqrt(weights @ (np.array(norms) - mean) ** 2)
    assert rule.threshold(0.0) == pytest.approx(mean + 4 * sigma, rel=1e-12)


@pytest.mark.parametrize(("z", "reaches"), [(2.0, 2.0), (2.5, 2.5), (5.0, 1.25), (250.0, 0.025)])
def test_z_score_clips_the_harder_the_larger_the_norm(z, reaches):
    """ZClip, arXiv 2504.02507: z_max**2 / z standard deviations above the mean."""
    rule = ZScoreClip(known_after=2)
    feed(rule, [9.0, 11.0])
    assert min(rule.threshold(10.0 + z), 10.0 + z) == pytest.approx(10.0 + reaches)


SPIKES = {"one spike": [1e6], "five": [1e6] * 5, "NaN": [NAN], "Inf": [INF], "huge": [1e300]}


@pytest.mark.parametrize("spikes", SPIKES.values(), ids=SPIKES)
@pytest.mark.parametrize("name", ["percentile", "mean and sigma", "z-score"])
def test_rule_that_met_a_spike_still_clips_the_next_one(name, spikes):
    """S14: what is learnt of a million is no more than what it was clipped to."""
    rule = {**RULES, "percentile": PercentileClip(bounds=(0.1, 1e9))}[name]
    rule, twin = copy.deepcopy(rule), copy.deepcopy(rule)
    feed(rule, noise(1000))
    feed(twin, noise(1000))
    feed(rule, spikes)
    assert rule.threshold(0.0) <= 3 * twin.threshold(0.0)
    assert rule.threshold(1e6) < 5.0


@pytest.mark.parametrize("name", ["percentile", "mean and sigma", "z-score"])
def test_norms_that_have_risen_for_good_pass_in_the_end(name):
    """A threshold that nothing can raise would clip a run for ever."""
    rule = copy.deepcopy(RULES[name])
    feed(rule, noise(100))
    thresholds = feed(rule, [10 * norm for norm in noise(200, seed=1)])
    assert thresholds[0] < 10
    clipped = [t < 10 * norm for t, norm in zip(thresholds, noise(200, seed=1), strict=True)]
    assert np.mean(clipped[-50:]) < 0.2


@pytest.mark.parametrize("name", ["mean and sigma", "z-score"])
def test_norms_that_do_not_vary_are_not_clipped_for_noise(name):
    rule = copy.deepcopy(RULES[name])
    feed(rule, [2.0] * 50)
    assert rule.threshold(2.001) > 2.001
    feed(rule, [4.0] * 400)
    assert rule.threshold(4.0) >= 4.0, "and a spread of 0 is left again"


@pytest.mark.parametrize("norm", EXTREME)
def test_extreme_norm_leaves_a_rule_that_works(rule, norm):
    """C4, and ZClip's flaw: a NaN stays in its averages. Two of the first five norms, and more."""
    for _ in range(2):
        assert rule.threshold(norm) > 0
        rule.update(norm)
    thresholds = feed(rule, noise(300))
    assert all(0 < t < 40 for t in thresholds[-20:])
    for _ in range(10):
        assert rule.threshold(norm) > 0
        rule.update(norm)
    feed(rule, noise(100))
    assert all(0 < t < 40 for t in feed(rule, noise(20)))


@given(st.lists(NORMS, max_size=60), NORMS)
def test_any_stream_gives_positive_thresholds_and_what_is_not_finite_teaches_nothing(norms, last):
    for rule in map(copy.deepcopy, RULES.values()):
        assert all(t > 0 for t in feed(rule, norms))
        before = json.dumps(rule.state_dict(), allow_nan=False)
        rule.threshold(last)
        for bad in (NAN, INF, -INF):
            rule.update(bad)
        assert json.dumps(rule.state_dict(), allow_nan=False) == before


def test_state_round_trip_goes_on_with_the_same_thresholds(rule):
    fresh = copy.deepcopy(rule)
    feed(rule, [*noise(30), 50.0])
    saved = json.loads(json.dumps(rule.state_dict()))
    fresh.load_state_dict(saved)
    more = noise(60, seed=2, sigma=1.0)
    assert feed(fresh, more) == feed(rule, more)
    assert fresh.state_dict() == rule.state_dict()


def test_copies_of_a_rule_learn_apart(rule):
    twin = copy.deepcopy(rule)
    before = twin.state_dict()
    feed(rule, [*noise(30), 50.0])
    assert twin.state_dict() == before


@pytest.mark.parametrize("kind", [PercentileClip, MeanSigmaClip])
def test_window_of_a_longer_one_is_taken_as_far_as_there_is_room(kind):
    long, short = kind(window=100, known_after=1), kind(window=10, known_after=1)
    feed(long, [5.0] * 90 + [2.0] * 10)
    short.load_state_dict(long.state_dict())
    assert short.state_dict()["norms"] == long.state_dict()["norms"][-10:]
    assert feed(short, [2.0])[0] < 2.1


def test_rules_are_what_the_callback_asks_for(rule):
    assert isinstance(rule, ClipRule)
    assert isinstance(rule, CutsLearningRate) == isinstance(rule, TieredClip)


@pytest.mark.parametrize("name", ["norm", "sigmas"])
def test_options_are_frozen(name):
    rule = FixedClip() if name == "norm" else MeanSigmaClip()
    with pytest.raises(AttributeError, match=name):
        setattr(rule, name, 2.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FixedClip, {"norm": 0}, "norm must be greater than 0, got 0"),
        (FixedClip, {"norm": NAN}, "norm must be greater than 0, got nan"),
        (TieredClip, {"tiers": [(5, 2, 1), (10, 5, 0.5)]}, "above must be .* below 5, got 10"),
        (TieredClip, {"tiers": [(5, 2)]}, r"each of tiers must be .*, got \(5, 2\)"),
        (TieredClip, {"tiers": [(5, 6, 1.0)]}, "clip_to must be in .*above=5.*, got 6"),
        (TieredClip, {"tiers": [(5, 2, 0)]}, r"lr_factor must be in \(0, 1\], got 0"),
        (TieredClip, {"otherwise": -1.0}, "otherwise must be greater than 0, got -1.0"),
        (TieredClip, {"lr_steps": 0}, "lr_steps must be at least 1, got 0"),
        (PercentileClip, {"percentile": 0}, "percentile must be in .*, got 0"),
        (PercentileClip, {"percentile": 101}, "percentile must be in .*, got 101"),
        (PercentileClip, {"window": 0}, "window must be at least 1, got 0"),
        (PercentileClip, {"bounds": (2.0, 1.0)}, r"bounds must be .*, got \(2.0, 1.0\)"),
        (PercentileClip, {"bounds": (0.0, 1.0)}, r"bounds must be .*, got \(0.0, 1.0\)"),
        (PercentileClip, {"until_known": NAN}, "until_known must be .*, got nan"),
        (PercentileClip, {"window": 50}, "known_after must be in 1..window=50, got 100"),
        (MeanSigmaClip, {"sigmas": 0}, "sigmas must be .*, got 0"),
        (MeanSigmaClip, {"window": 0}, "window must be at least 1, got 0"),
        (MeanSigmaClip, {"known_after": 0}, "known_after must be .*, got 0"),
        (MeanSigmaClip, {"until_known": 0}, "until_known must be .*, got 0"),
        (ZScoreClip, {"z_max": INF}, "z_max must be .*, got inf"),
        (ZScoreClip, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        (ZScoreClip, {"known_after": 0}, "known_after must be at least 1, got 0"),
        (ZScoreClip, {"until_known": -1}, "until_known must be .*, got -1"),
    ],
)
def test_option_out_of_range_is_refused_with_its_value(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def feed_tensors(rule, steps):
    """The limits before each step, whose clipped norms are then learnt."""
    limits = []
    for norms in steps:
        limits.append(dict(zip(norms, rule.tensor_thresholds(list(norms)), strict=True)))
        rule.update_tensors(list(norms), [min(n, limits[-1][k]) for k, n in norms.items()])
        rule.update(1.0)
    return limits


def test_tensor_is_limited_by_its_own_average_and_a_held_spike_hardly_raises_it():
    rule = PerTensorClip(known_after=10)
    usual = {"a": 1.0, "b": 0.01}
    limits = feed_tensors(rule, [usual] * 10 + [{"a": 1e6, "b": 0.01}] * 20 + [usual])
    assert limits[9] == {"a": INF, "b": INF}
    assert limits[10] == {"a": 1.05, "b": pytest.approx(0.0105)}
    assert limits[30]["a"] == pytest.approx(1.05 * 1.001**20)
    assert limits[30]["b"] == limits[10]["b"], "the other tensor is as it was"


def test_whole_gradient_is_clipped_until_tensors_are_known():
    rule = PerTensorClip(known_after=3, until_known=2.0)
    assert feed(rule, [9.0, NAN, 9.0, 9.0, 9.0]) == [2.0, 2.0, 2.0, 2.0, INF]


@pytest.mark.parametrize("bad", [NAN, INF, 0.0, 1e200])
def test_norm_that_is_zero_or_not_finite_teaches_a_tensor_nothing(bad):
    """A zero among the first norms would stop a tensor for ever."""
    rule, twin = PerTensorClip(known_after=3), PerTensorClip(known_after=3)
    rule.update_tensors(["a"], [bad])
    for each in (rule, twin):
        feed_tensors(each, [{"a": 2.0}] * 5)
    rule.update_tensors(["a"], [bad])
    assert rule.tensor_thresholds(["a"]) == twin.tensor_thresholds(["a"])


def test_tensor_that_comes_later_has_first_steps_of_its_own_and_state_is_kept():
    rule = PerTensorClip(known_after=3)
    feed_tensors(rule, [{"a": 2.0}] * 5 + [{"a": 2.0, "late": 7.0}] * 2)
    copied = PerTensorClip(known_after=3)
    copied.load_state_dict(copy.deepcopy(rule.state_dict()))
    for each in (rule, copied):
        limits = feed_tensors(each, [{"late": 7.0}] * 2)
        assert limits == [{"late": INF}, {"late": pytest.approx(7.35)}]
    assert copied.state_dict() == rule.state_dict()


@pytest.mark.parametrize(
    "option", [{"ratio": 1.0}, {"decay": 1.0}, {"until_known": 0.0}, {"known_after": 0}]
)
def test_wrong_option_of_per_tensor_clip_is_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be"):
        PerTensorClip(**option)
