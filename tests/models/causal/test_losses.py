"""One against the rest, and the gated regression, C2 and C4."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from models.causal.heads import Cauchy
from models.causal.losses import gated_regression, loss_at_chance, one_vs_rest, probabilities


def scores(*shape, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(*shape, generator=generator) * spread
    return Cauchy(loc, torch.rand(*shape, generator=generator) + 0.1)


@pytest.mark.parametrize("form", ["stable", "naive"])
def test_one_vs_rest_is_the_sum_of_binary_cross_entropies(form):
    """C2, C5: the loss against its formula, by scipy."""
    found, targets, threshold = scores(4, 7), torch.tensor([0, 6, 3, 3]), 0.3
    p = stats.cauchy.sf(threshold, found.loc.numpy(), found.scale.numpy())
    one_hot = np.eye(7)[targets]
    expected = -(one_hot * np.log(p) + (1 - one_hot) * np.log(1 - p)).sum(axis=1)
    loss = one_vs_rest(found, targets, threshold=threshold, form=form)
    assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_one_vs_rest_at_chance_over_the_vocabulary_of_qwen_is_above_100_000():
    """C3: the "over 100,000" of the first batch is K ln 2."""
    even = Cauchy(torch.zeros(1, 151_937), torch.ones(1, 151_937))
    loss = one_vs_rest(even, torch.tensor([151_936]), threshold=0.0).item()
    assert loss == pytest.approx(loss_at_chance(151_937), rel=1e-4)
    assert loss == pytest.approx(1.0531e5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_scores_break_the_naive_form_and_not_the_stable_one(dtype):
    """C4: what the naive form gives is Inf, and no clipping makes a gradient of it."""
    loc = torch.tensor([[-1e9, 1e9, 0.0]], dtype=dtype, requires_grad=True)
    found, target = Cauchy(loc, torch.ones_like(loc).detach()), torch.tensor([0])
    naive = one_vs_rest(found, target, threshold=0.0, form="naive").sum()
    assert naive.isinf()
    (gradient,) = torch.autograd.grad(naive, loc)
    assert not gradient.isfinite().all()
    loc.grad = gradient
    torch.nn.utils.clip_grad_norm_([loc], 1.0)
    assert not loc.grad.isfinite().all(), "clipping scales every number by NaN"
    stable = one_vs_rest(found, target, threshold=0.0).sum()
    assert stable.item() == pytest.approx(2 * math.log(math.pi * 1e9) + math.log(2), rel=1e-3)
    (gradient,) = torch.autograd.grad(stable, loc)
    assert gradient.isfinite().all()
    assert gradient[0, 0] < 0 < gradient[0, 1]


def test_regression_counts_numbers_alone_and_is_the_density():
    value = Cauchy(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0]))
    target, known = torch.tensor([4.0, 0.0, -1e30]), torch.tensor([True, False, True])
    loss = gated_regression(value, target, known, torch.ones(3), hardness=1.0)
    expected = [-stats.cauchy.logpdf(4.0, 1.0, 0.5), 0.0, -stats.cauchy.logpdf(-1e30, 3.0, 2.0)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("hardness", "gate"), [(1.0, 1.0), (0.0, 0.2), (0.5, 0.6)])
def test_gate_is_open_when_hard_and_follows_the_probability_when_soft(hardness, gate):
    value, target = Cauchy(torch.tensor([1.0]), torch.tensor([0.5])), torch.tensor([4.0])
    p = torch.tensor([0.2], requires_grad=True)
    loss = gated_regression(value, target, torch.tensor([True]), p, hardness=hardness)
    assert loss.item() == pytest.approx(-gate * stats.cauchy.logpdf(4.0, 1.0, 0.5), rel=1e-5)
    assert not loss.requires_grad, "a gate that learns would close itself"


def test_missing_number_sends_no_gradient():
    loc, scale = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    value, known = torch.tensor([0.0, 2.0]), torch.tensor([False, True])
    loss = gated_regression(Cauchy(loc, scale), value, known, torch.ones(2), hardness=1.0)
    loss.sum().backward()
    assert loc.grad.tolist() == pytest.approx([0.0, -0.8])
    assert scale.grad[0] == 0


def test_probabilities_are_those_of_exceeding_the_threshold():
    found = scores(2, 5)
    expected = stats.cauchy.sf(0.7, found.loc.numpy(), found.scale.numpy())
    assert np.allclose(probabilities(found, 0.7).numpy(), expected, rtol=1e-5)
