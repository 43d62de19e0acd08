"""Losses, rates and update ratios in, one objection out."""

import math

import numpy as np
import pytest

from lit_stability.detectors import NoLearning
from tests.detectors.streams import steps_of, told, told_with_a_resume

NOISE = (0.1 * np.random.default_rng(0).standard_normal(2000)).tolist()


def rows(losses, *, ratio=1e-3, warm_up=1):
    return [
        {
            "loss": loss + noise,
            "learning_rates": (1e-3 * min(1.0, (i + 1) / warm_up),),
            "update_ratio": ratio if i else None,
        }
        for i, (loss, noise) in enumerate(zip(losses, NOISE, strict=False))
    ]


FLAT = [6.9] * 1000


@pytest.mark.parametrize(
    ("losses", "options", "expected"),
    [
        (FLAT, {}, [550]),
        ([6.9 + 0.001 * i for i in range(1000)], {}, [550]),
        # A descent, whenever it comes before; a slow one; one that a plateau follows.
        ([6.9] * 400 + [6.0] * 600, {}, []),
        ([6.9 - 0.001 * i for i in range(1000)], {}, []),
        ([*np.linspace(6.9, 3.0, 200).tolist(), *[3.0] * 800], {}, []),
        # It learnt, and lost it again.
        ([6.9] * 100 + [3.0] * 200 + [9.0] * 700, {}, []),
        # A warm-up does not count.
        (FLAT, {"warm_up": 1000}, []),
        (FLAT, {"warm_up": 300}, [849]),
        ([math.nan] * 1000, {}, []),
    ],
)
def test_loss_that_never_fell_is_told_of_once(losses, options, expected):
    """T2, C5: alive by its gradients, and it learns nothing."""
    assert steps_of(told(NoLearning(), rows(losses, **options))) == expected


def test_fall_that_is_too_small_yet_to_count_is_waited_for():
    """A hundredth after 690 steps, while the question is put after 550."""
    stream = [{"loss": 6.9 - 1e-4 * min(i, 1000), "update_ratio": 1e-3} for i in range(2000)]
    assert told(NoLearning(), stream) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_margin_goes_with_the_noise_of_the_loss(seed, sigma):
    """A fall by two sigmas is learning, however large they are."""
    noise = sigma * np.random.default_rng(seed).standard_normal(1000)
    fall = 2 * sigma * np.linspace(0, 1, 1000)
    stands = [{"loss": x, "update_ratio": 1e-3} for x in (20 + noise).tolist()]
    falls = [{"loss": x, "update_ratio": 1e-3} for x in (20 + noise - fall).tolist()]
    assert len(told(NoLearning(patience=900), stands)) == 1
    assert told(NoLearning(patience=900), falls) == []


@pytest.mark.parametrize(
    ("ratio", "signal", "words"),
    [
        (0.0, "update_ratio", "the weights do not move, at a learning rate of 0.001"),
        (1e-9, "update_ratio", "do not move"),
        (1e-6, "weight_path", "549 updates have moved the weights by at most 0.05%"),
        (1e-3, "loss", "the weights do move, by 0.001 of their norm a step"),
        (None, "loss", "how far the weights move is not known"),
    ],
)
def test_reason_is_told_by_the_signal(ratio, signal, words):
    """C5: frozen by mistake, a rate so low that the model is dead, or another reason."""
    (anomaly,) = told(NoLearning(), rows(FLAT, ratio=ratio))
    assert anomaly.signal == signal
    assert words in anomaly.message
    assert anomaly.warn_only


def test_nothing_is_said_of_steps_without_a_loss():
    stream = [row | {"has_loss": False, "loss": math.nan} for row in rows(FLAT)]
    assert told(NoLearning(), stream) == []


def test_resume_neither_forgets_nor_tells_twice():
    for at in (100, 540, 600):
        assert steps_of(told_with_a_resume(NoLearning, rows(FLAT), at)) == [550]


@pytest.mark.parametrize("options", [{"patience": 0}, {"still": -1.0}, {"little": 0.0}])
def test_option_out_of_range_is_refused_and_repeated(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        NoLearning(**options)
