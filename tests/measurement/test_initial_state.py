"""What counts as damaged before the first step, and what may be non-finite on purpose."""

import math

import pytest
import torch
from torch import nn

from lit_stability.measurement.initial_state import (
    DamagedState,
    buffers_with_nan,
    damaged_state,
)
from lit_stability.measurement.step_meter import StepMeter

NAN, INF = math.nan, math.inf


class Net(nn.Module):
    """A layer, statistics, and constants as models keep them."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.zeros(3, 3))
        self.register_buffer("unknown", torch.full((2,), NAN))
        self.register_buffer("limit", torch.tensor(INF), persistent=False)
        self.register_buffer("index", torch.arange(3))
        self.bias_mask = nn.Parameter(torch.full((3,), -INF), requires_grad=False)
        self.backbone = nn.Linear(2, 2).requires_grad_(False)


def trained(optimizer=torch.optim.AdamW):
    net = Net()
    optimizer = optimizer([p for p in net.parameters() if p.requires_grad], 1e-3)
    net.norm(net.layer(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    return net, optimizer


def found(net, optimizer, nan_before=("unknown",)):
    return damaged_state(net, [StepMeter(net.named_parameters(), optimizer)], nan_before)


def state_of(net, optimizer):
    return optimizer.state[net.layer.weight]


def test_state_of_a_healthy_model_with_constants_is_not_damaged():
    net, optimizer = trained()
    net.mask.fill_(-INF)
    assert buffers_with_nan(net) == ("unknown",)
    assert not found(net, optimizer)
    optimizer.add_param_group({"params": [net.bias_mask]})
    assert not found(net, optimizer)


DAMAGE = {
    "a weight": (lambda n, o: n.layer.weight.data[1, 1:2].fill_(NAN), "layer.weight"),
    "an infinite weight": (lambda n, o: n.norm.weight.data[:1].fill_(INF), "norm.weight"),
    "a frozen weight": (lambda n, o: n.backbone.weight.data[0].fill_(NAN), "backbone.weight"),
    "a first moment": (
        lambda n, o: state_of(n, o)["exp_avg"][0].fill_(NAN),
        "optimizer state of layer.weight",
    ),
    "an infinite second moment": (
        lambda n, o: state_of(n, o)["exp_avg_sq"][0].fill_(INF),
        "optimizer state of layer.weight",
    ),
    "a negative second moment": (
        lambda n, o: state_of(n, o)["exp_avg_sq"][0].fill_(-1e-12),
        "optimizer state of layer.weight",
    ),
    "a running variance": (lambda n, o: n.norm.running_var[:1].fill_(INF), "norm.running_var"),
    "a running mean": (lambda n, o: n.norm.running_mean[:1].fill_(NAN), "norm.running_mean"),
    "a buffer": (lambda n, o: n.mask[0].fill_(NAN), "mask"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGE.values(), ids=DAMAGE)
def test_state_that_is_damaged_is_named(damage, name):
    net, optimizer = trained()
    damage(net, optimizer)
    assert found(net, optimizer).names == (name,)


def test_state_of_large_finite_weights_is_not_damaged():
    """Their norm overflows; their elements are finite."""
    net, optimizer = trained()
    net.mask.fill_(1e30)
    net.backbone.weight.data.fill_(1e30)
    assert not found(net, optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_in_other_formats_is_checked(dtype):
    net, optimizer = trained()
    net.to(dtype)
    net.layer.weight.data[0, 0] = NAN
    assert found(net, optimizer).names == ("layer.weight",)


def test_damage_found_by_several_ranks_is_named_once():
    ranks = [DamagedState(weights=("a",)), DamagedState(weights=("a", "b"), buffers=("c",))]
    both = DamagedState.of_ranks(ranks)
    assert both.names == ("a", "b", "c")
    assert both.text() == "a is non-finite, and 2 more"
    assert not DamagedState.of_ranks([DamagedState(), DamagedState()])
