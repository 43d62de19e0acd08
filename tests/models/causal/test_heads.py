"""Numbers as inputs, abduction, action, and how they start, C1 and C3."""

import math

import pytest
import torch

from models.causal.heads import (
    AbductionNetwork,
    ActionNetwork,
    Cauchy,
    HeadsConfig,
    NumberEmbedding,
    initialise,
)

H, D, K = 24, 16, 50


def heads(init="small_gain", floor=1e-3):
    torch.manual_seed(0)
    abduction, action = AbductionNetwork(H, D, floor), ActionNetwork(D, K)
    initialise(abduction, action, init)
    return abduction, action


def test_number_embedding_follows_the_logarithm_and_tells_a_missing_number():
    torch.manual_seed(0)
    embed = NumberEmbedding(H, 0.02)
    values = torch.tensor([0.0, math.e - 1, 1 - math.e, 0.0, 3e38])
    with torch.no_grad():
        out = embed(values, torch.tensor([True, True, True, False, True]))
    base, direction = embed.base_H.detach(), embed.direction_H.detach()
    assert torch.equal(out[0], base)
    assert torch.allclose(out[1], base + direction)
    assert torch.allclose(out[2], base - direction)
    assert torch.equal(out[3], base + embed.missing_H)
    assert out.isfinite().all()


def test_scales_of_u_stay_above_the_floor():
    abduction, _ = heads("wide", floor=0.25)
    scale = abduction(torch.randn(200, H) * 100).scale
    assert scale.min() == 0.25, "softplus is 0 there"


def test_action_maps_locations_and_scales_by_linearity():
    """C1: loc_S = A loc_U + B, scale_S = |A| scale_U, and the same for Y."""
    _, action = heads("torch")
    u = Cauchy(torch.randn(3, D), torch.rand(3, D) + 0.1)
    found = action(u)
    a, b = action.score.weight, action.score.bias
    assert torch.allclose(found.scores_BK.loc, u.loc @ a.T + b, atol=1e-6)
    assert torch.allclose(found.scores_BK.scale, u.scale @ a.abs().T, atol=1e-6)
    w = action.value.weight
    assert torch.allclose(found.value_B.loc, (u.loc @ w.T + action.value.bias)[:, 0], atol=1e-6)
    assert torch.allclose(found.value_B.scale, (u.scale @ w.abs().T)[:, 0], atol=1e-6)


def bound(linear):
    return linear.weight.abs().max().item()


def test_initialisations_are_what_they_are_called():
    """C3, C5: Xavier with gain 0.1 and biases of 0.01; torch's own; one head missed; wide."""
    abduction, action = heads("small_gain")
    assert bound(abduction.loc) == pytest.approx(0.1 * math.sqrt(6 / (H + D)), rel=0.02)
    assert bound(action.score) == pytest.approx(0.1 * math.sqrt(6 / (D + K)), rel=0.02)
    assert all(
        (m.bias == 0.01).all() for m in (abduction.loc, abduction.scale, action.score, action.value)
    )
    _, default = heads("torch")
    assert bound(default.score) == pytest.approx(1 / math.sqrt(D), rel=0.02)
    abduction, missed = heads("missed_action")
    assert (abduction.loc.bias == 0.01).all()
    assert bound(missed.score) == pytest.approx(1 / math.sqrt(D), rel=0.02)
    abduction, wide = heads("wide")
    assert abduction.loc.weight.std().item() == pytest.approx(10, rel=0.1)
    assert wide.score.weight.std().item() == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"init": "he"}, "init='he' is unknown"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"scale_floor": -1.0}, r"scale_floor=-1\.0 must be 0 or more"),
    ],
)
def test_impossible_option_is_refused_with_its_value(options, problem):
    with pytest.raises(ValueError, match=problem):
        HeadsConfig(**options)
