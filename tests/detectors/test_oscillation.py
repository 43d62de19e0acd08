"""Losses in, widening swings out."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lit_stability.detectors import Oscillation
from tests.detectors.streams import steps_of, told, told_with_a_resume

C = [2.0, 1.8, 2.2, 1.6, 2.5, 1.4, 3.2, 1.2, 5.8, math.nan]
CALM = (2 + 0.1 * np.random.default_rng(0).standard_normal(60)).tolist()


def rows(losses):
    return [{"loss": loss} for loss in losses]


def swings(growth, count=10, first=0.02):
    """A loss around 2 whose swings grow by a factor each."""
    return [2 + first * (-growth) ** i / 2 for i in range(count)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (C, [7]),
        # The last change before them is a swing as well.
        ([*CALM, *C], [66]),
        # A jump, an exponential growth: other patterns.
        ([2.0, 1.9, 1.8, 1.7, 9.0, 9.1, 9.2, 9.0, 9.1], []),
        ([2.0 * 1.3**i for i in range(20)], []),
        (CALM, []),
        # Swings that stay, that shrink, that grow but not by eight, that grow within the noise.
        (swings(1.0, 40, 1.0), []),
        (swings(0.8, 40, 4.0), []),
        (swings(1.05, 20, 1.0), []),
        ([*CALM, *swings(1.5, 10, 0.001)], []),
        (swings(1.8, 12), [8]),
        # Told once for all of a run, and again for the next.
        ([*swings(1.8, 12), *[2.0] * 9, *swings(1.8, 12)], [8, 29]),
    ],
)
def test_widening_swings_of_a_stream_are_told_of(losses, expected):
    """S2: pattern C, oscillating divergence."""
    assert steps_of(told(Oscillation(), rows(losses))) == expected


def test_step_is_good_as_it_is():
    (anomaly,) = told(Oscillation(), rows(C))
    assert anomaly.warn_only
    assert not anomaly.state_corrupted
    assert (anomaly.value, anomaly.baseline) == (pytest.approx(2.0), pytest.approx(0.2))


@pytest.mark.parametrize("rate", [0.2, 0.4])
@pytest.mark.parametrize("seed", [1, 2])
def test_descent_at_the_edge_of_stability_is_silent(rate, seed):
    """It swings, and it trains."""
    torch.manual_seed(seed)
    x = torch.randn(64, 8)
    y = torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    losses = []
    for _ in range(600):
        loss = (net(x) - y).square().mean()
        losses.append(float(loss.detach()))
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= rate * g
    rises = sum(b > a for a, b in pairwise(losses))
    assert rises > 60
    assert losses[-1] < 0.1 * losses[0]
    assert told(Oscillation(), rows(losses)) == []


def test_resume_neither_forgets_nor_tells_twice():
    stream = rows([*CALM, *C])
    for at in (30, 64, 67):
        assert steps_of(told_with_a_resume(Oscillation, stream, at)) == [66]


@pytest.mark.parametrize(
    "options", [{"swings": 2}, {"growth": 1.0}, {"sigmas": 0.0}, {"rise": -1.0}, {"min_history": 0}]
)
def test_option_out_of_range_is_refused_and_repeated(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        Oscillation(**options)
