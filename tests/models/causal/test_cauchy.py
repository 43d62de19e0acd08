"""The distribution against scipy, over 40 orders of magnitude, C2."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck

from models.causal import cauchy

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]


def arguments(dtype, n=20_000):
    """Values and locations of either sign, and scales, of sizes from 1e-20 to 1e20."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        exponent = torch.rand(n, generator=generator, dtype=torch.float64) * 40 - 20
        return (10**exponent).to(dtype)

    signs = [torch.randint(0, 2, (n,), generator=generator) * 2 - 1 for _ in range(2)]
    return signs[0] * draw(), signs[1] * draw(), draw()


def exactly(*tensors):
    return [each.detach().double().numpy() for each in tensors]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    ("ours", "reference"),
    [(cauchy.log_density, stats.cauchy.logpdf), (cauchy.log_exceedance, stats.cauchy.logsf)],
)
def test_logarithm_of_any_size_agrees_with_scipy(ours, reference, dtype, tolerance):
    value, loc, scale = arguments(dtype)
    found = ours(value, loc, scale)
    assert found.dtype == dtype
    expected = reference(*exactly(value, loc, scale))
    # A density is a difference of two logarithms, each rounded to the precision of the arguments.
    size = np.maximum(np.abs(expected), 1)
    if ours is cauchy.log_density:
        size = np.maximum(size, np.abs(np.log(exactly(scale)[0])))
    assert (np.abs(exactly(found)[0] - expected) <= tolerance * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_size_are_finite_and_agree_with_the_formula(dtype):
    """d log P / d loc = density / P, and d log p / d loc = 2 gap / (scale^2 + gap^2)."""
    value, loc, scale = arguments(dtype)
    loc.requires_grad_(), scale.requires_grad_()
    for function in (cauchy.log_density, cauchy.log_exceedance):
        for gradient in torch.autograd.grad(function(value, loc, scale).sum(), (loc, scale)):
            assert gradient.isfinite().all()
    (by_loc,) = torch.autograd.grad(cauchy.log_exceedance(value, loc, scale).sum(), loc)
    v, m, s = exactly(value, loc, scale)
    expected = np.exp(stats.cauchy.logpdf(v, m, s) - stats.cauchy.logsf(v, m, s))
    normal = (expected > 1e-30) & (expected < 1e30)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert np.allclose(exactly(by_loc)[0][normal], expected[normal], rtol=tolerance)


def test_functions_pass_gradcheck_twice():
    generator = torch.Generator().manual_seed(1)
    value, loc = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(2))
    value[0] = loc[0]  # at the very threshold, where a formula by abs() has no slope
    scale = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    loc.requires_grad_(), scale.requires_grad_()
    for function in (cauchy.log_density, cauchy.log_exceedance, cauchy.exceedance):
        assert gradcheck(lambda m, s, f=function: f(value, m, s), (loc, scale))
        assert gradgradcheck(lambda m, s, f=function: f(value, m, s), (loc, scale))
    chance = torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    assert gradcheck(lambda m, s: cauchy.quantile(chance, m, s), (loc, scale))


def test_tails_are_one_together_and_a_half_at_the_location():
    loc, scale = torch.tensor([3.0, -2.0, 1e10]), torch.tensor([0.5, 1e8, 1e-8])
    above = cauchy.exceedance(torch.tensor([1.0, 7.0, 0.0]), loc, scale)
    below = cauchy.exceedance(torch.tensor([-1.0, -7.0, 0.0]), -loc, scale)
    assert torch.allclose(above + below, torch.ones(3))
    assert torch.equal(cauchy.exceedance(loc, loc, scale), torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("dtype", "ratio"), [(torch.float32, 1e8), (torch.bfloat16, 1e3)], ids=["fp32", "bf16"]
)
def test_saturated_probability_keeps_its_logarithm_where_the_naive_form_loses_it(dtype, ratio):
    """C2, C5: a class that is wanted and far below its threshold, and one that is not, above."""
    loc, scale = torch.tensor([-ratio, ratio], dtype=dtype), torch.ones(2, dtype=dtype)
    naive = cauchy.naive_exceedance(0.0, loc, scale)
    assert naive[0].log().isinf()
    assert (1 - naive[1]).log().isinf()
    expected = -math.log(math.pi * ratio)
    assert cauchy.log_exceedance(0.0, loc, scale)[0].item() == pytest.approx(expected, rel=0.01)
    assert cauchy.log_exceedance(0.0, -loc, scale)[1].item() == pytest.approx(expected, rel=0.01)


def test_linear_map_has_the_sums_of_locations_and_scales():
    """C1: against draws of U, by their quartiles, which for S are loc - scale and loc + scale."""
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]]), torch.tensor([1.0, -1.0])
    loc, scale = torch.tensor([0.5, 1.0, -2.0]), torch.tensor([1.0, 0.2, 2.0])
    found_loc, found_scale = cauchy.linear(weight, bias, loc, scale)
    assert found_loc.tolist() == [-1.5, -7.0]
    assert found_scale.tolist() == pytest.approx([2.4, 6.0])
    many = (200_000, 3)
    drawn = cauchy.sample(loc.expand(many), scale.expand(many), generator=generator)
    scores = drawn @ weight.T + bias
    low, high = torch.quantile(scores, 0.25, dim=0), torch.quantile(scores, 0.75, dim=0)
    assert low.tolist() == pytest.approx((found_loc - found_scale).tolist(), abs=0.1)
    assert high.tolist() == pytest.approx((found_loc + found_scale).tolist(), abs=0.1)


def test_sample_follows_its_location_and_scale():
    loc, scale = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    drawn = cauchy.sample(loc, scale, generator=torch.Generator().manual_seed(3))
    drawn.backward()
    assert loc.grad.item() == 1.0
    assert scale.grad.item() == pytest.approx((drawn.item() - 2.0) / 3.0, rel=1e-5)
