"""The initialisations of T2: which train, and which stalls."""

import math

import pytest
import torch
from torch.nn import functional as F


def first_gradients(model, batch):
    logits = model(batch.source_BS, batch.target_BT[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch.target_BT[:, 1:].flatten(), ignore_index=0)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def loss_after(model, batch, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = math.nan
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = first_gradients(model, batch)
        optimizer.step()
    return loss


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("feedforward", ["relu", "swiglu"])
def test_zombie_has_no_gradient_upstream_of_the_last_norm(norm, feedforward, model_of, batch):
    """T2: the first loss is ln V exactly, and only the last norm can learn."""
    model = model_of(init="zombie", norm=norm, feedforward=feedforward, tie_weights=False)
    loss, gradients = first_gradients(model, batch)
    assert loss == pytest.approx(math.log(40), abs=1e-5)
    moved = {name for name, gradient in gradients.items() if gradient.any()}
    assert moved <= {"decoder.norm.weight", "decoder.norm.bias"}
    assert moved


def test_zombie_stalls_where_the_other_initialisations_learn(model_of, batch):
    """T2: five sentences, learnt by heart or not."""
    assert loss_after(model_of(init="xavier"), batch, 60) < 0.1
    assert loss_after(model_of(init="zombie"), batch, 60) > 1.5
    assert loss_after(model_of(init="inner_zero"), batch, 150) < 0.1


@pytest.mark.parametrize("feedforward", ["relu", "swiglu"])
def test_zombie_feedforwards_stay_dead_after_many_steps(feedforward, model_of, batch):
    """T2: ReLU and SwiGLU have no slope at zero, so their gains never leave it."""
    model = model_of(init="zombie", feedforward=feedforward)
    loss_after(model, batch, 100)
    gains = dict(model.named_parameters())
    dead = [name for name in gains if name.endswith("feedforward_residual.norm.weight")]
    assert len(dead) == 4
    assert not any(gains[name].any() for name in dead)


@pytest.mark.parametrize("norm", [pytest.param("layernorm", marks=pytest.mark.long), "rmsnorm"])
def test_zombie_under_post_norm_stalls_for_good(norm, model_of, batch):
    """T2: at best the frequencies of the tokens are learnt."""
    model = model_of(init="zombie", norm_position="post", norm=norm)
    assert loss_after(model, batch, 200) > 2.0


@pytest.mark.parametrize("feedforward", ["relu", "swiglu"])
def test_inner_zero_starts_bypassed_and_every_gain_has_a_gradient(feedforward, model_of, batch):
    """T2: inner gains 0, final gains 1."""
    model = model_of(init="inner_zero", feedforward=feedforward)
    inner = {n: p for n, p in model.named_parameters() if n.endswith("_residual.norm.weight")}
    assert len(inner) == 2 * 2 + 2 * 3
    assert not any(gain.any() for gain in inner.values())
    assert model.encoder.norm.weight.eq(1).all()
    assert model.decoder.norm.weight.eq(1).all()
    _, gradients = first_gradients(model, batch)
    # Attention is constant over positions at zero gain, and moves one step after its values do.
    assert all(gradients[name].any() for name in inner if "feedforward" in name)
