"""Clipping from a norm that is known."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lit_stability.measurement.step_stats import StepStats
from lit_stability.training_state.gradient_clipping import (
    clip_coefficient,
    clip_step,
    clip_threshold,
    gradients_are_new,
    scale_gradients,
)

POSITIVE = st.floats(1e-30, 1e30)


@pytest.mark.parametrize(
    ("norm", "max_norm", "coefficient"),
    [
        (4.0, 1.0, 0.25),
        (16.0, 0.5, 0.03125),
        (1.0, 1.0, 1.0),
        (0.0, 1.0, 1.0),
        (0.5, 1.0, 1.0),
        (5.0, math.inf, 1.0),
    ],
)
def test_clip_coefficient_has_known_answers(norm, max_norm, coefficient):
    assert clip_coefficient(norm, max_norm) == coefficient


@given(POSITIVE, POSITIVE)
def test_clip_coefficient_never_enlarges_and_never_leaves_too_much(norm, max_norm):
    coefficient = clip_coefficient(norm, max_norm)
    assert 0 < coefficient <= 1
    assert coefficient * norm <= max_norm * (1 + 1e-15)


@pytest.mark.parametrize(
    ("norm", "max_norm"),
    [(math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, -1.0), (2.0, math.nan)],
)
def test_clip_coefficient_of_what_cannot_be_clipped_is_refused(norm, max_norm):
    """C4: no clipping mends a NaN."""
    with pytest.raises(ValueError, match=f"norm={norm!r} to max_norm={max_norm!r}"):
        clip_coefficient(norm, max_norm)


def test_clip_of_a_known_peak_brings_it_to_its_bound():
    """N6: a norm of 16.62."""
    weight = nn.Parameter(torch.zeros(100))
    weight.grad = torch.full((100,), 1.662)
    scale_gradients([weight], clip_coefficient(16.62, 0.75))
    assert float(weight.grad.norm()) == pytest.approx(0.75, rel=1e-6)


def test_clip_from_the_measured_norm_equals_torch():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.zeros(n)) for n in (3, 50)]
    theirs = [nn.Parameter(torch.zeros(n)) for n in (3, 50)]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape) * 9
        b.grad = a.grad.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(theirs, 1.5))
    scale_gradients(ours, clip_coefficient(norm, 1.5))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=2e-6, atol=0)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scale_gradients_is_in_place_and_skips_missing_ones(dtype):
    weight, bias = nn.Parameter(torch.zeros(3, dtype=dtype)), nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, -2.0, 4.0], dtype=dtype)
    kept = weight.grad
    scale_gradients(iter([weight, bias]), 0.5)
    assert weight.grad is kept
    assert kept.tolist() == [0.5, -1.0, 2.0]
    assert bias.grad is None


def test_scale_gradients_takes_sparse_ones():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    scale_gradients(table.parameters(), 0.5)
    assert table.weight.grad.to_dense()[:, 0].tolist() == [0, 0.5, 0, 0.5, 0]


def test_scale_gradients_by_one_touches_nothing():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    version = weight.grad._version
    scale_gradients([weight], 1.0)
    assert weight.grad._version == version


def test_scale_gradients_without_any_does_nothing():
    weight = nn.Parameter(torch.ones(3))
    scale_gradients([weight], 0.5)
    assert weight.grad is None
    assert weight.tolist() == [1, 1, 1]


def one_weight(norm):
    """An optimizer whose gradient has this norm, and its measurement."""
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), norm / 2)
    return torch.optim.SGD([weight], 0.1), StepStats(step=0, loss=1.0, grad_norm=norm)


@pytest.mark.parametrize(
    "order", [(5.0, 2.0), (2.0, 5.0), (2.0, 2.0), (2.0, 32.0), (1.0, 4.0, 2.0)]
)
def test_step_clipped_by_several_keeps_the_smallest_threshold(order):
    """K3: never the product of what each would multiply by."""
    optimizer, stats = one_weight(16.0)
    totals = [clip_step(optimizer, stats, threshold) for threshold in order]
    assert float(optimizer.param_groups[0]["params"][0].grad.norm()) == min(order)
    assert totals[-1] == min(order) / 16


def test_threshold_of_a_step_is_the_smallest_that_was_asked_for_it_alone():
    optimizer, stats = one_weight(16.0)
    assert clip_threshold(optimizer, stats) is None
    for threshold in (32.0, 20.0, 25.0):
        clip_step(optimizer, stats, threshold)
    assert clip_threshold(optimizer, stats) == 20.0, "also where nothing was clipped"
    assert clip_threshold(optimizer, StepStats(step=1, loss=1.0, grad_norm=16.0)) is None


def test_step_whose_measurement_was_replaced_is_still_the_same_step():
    """At a change of regime the monitor hands out other learning rates for the step at hand."""
    optimizer, stats = one_weight(16.0)
    assert clip_step(optimizer, stats, 8.0) == 0.5
    assert clip_step(optimizer, replace(stats, learning_rates=(0.1,)), 6.4) == 0.4
    weight = optimizer.param_groups[0]["params"][0]
    assert float(weight.grad.norm()) == pytest.approx(6.4)
    assert clip_threshold(optimizer, stats) == 6.4


def test_step_that_is_retried_has_gradients_that_nobody_has_clipped():
    optimizer, stats = one_weight(16.0)
    clip_step(optimizer, stats, 4.0)
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.full((4,), 8.0)
    gradients_are_new(optimizer)
    assert clip_threshold(optimizer, stats) is None
    assert clip_step(optimizer, stats, 4.0) == 0.25
    assert float(weight.grad.norm()) == 4.0


def test_next_step_and_other_optimizers_are_clipped_from_scratch():
    optimizer, stats = one_weight(16.0)
    clip_step(optimizer, stats, 1.0)
    other, _ = one_weight(16.0)
    assert clip_step(other, stats, 4.0) == 0.25
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.full((4,), 8.0)
    assert clip_step(optimizer, StepStats(step=1, loss=1.0, grad_norm=16.0), 4.0) == 0.25
    assert float(weight.grad.norm()) == 4.0


def test_step_below_its_threshold_is_left_alone():
    optimizer, stats = one_weight(16.0)
    version = optimizer.param_groups[0]["params"][0].grad._version
    assert clip_step(optimizer, stats, 16.0) == 1.0
    assert optimizer.param_groups[0]["params"][0].grad._version == version
