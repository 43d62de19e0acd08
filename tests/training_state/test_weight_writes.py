"""Writes to weights in other places than the optimizer's step."""

import pytest
import torch
from torch import nn

from lit_stability.training_state.weight_writes import WeightWrites


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def watching(net, optimizer, **options):
    writes = WeightWrites(net, [optimizer], **options)
    writes.begin(samples=True)
    return writes


def step(net, optimizer):
    optimizer.zero_grad()
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_step_is_no_write(make, net):
    optimizer = make(net.parameters(), lr=0.1)
    writes = watching(net, optimizer)
    step(net, optimizer)
    assert not writes.check()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_write_is_found(through_data, when, net):
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    writes = watching(net, optimizer)
    if when == "after the step":
        step(net, optimizer)
    written = net[1].weight
    with torch.no_grad():
        (written.data if through_data else written).mul_(0.5)
    assert writes.check()
    assert [p is written for p in writes.written] == [True]
    assert not writes.check(), "it is known now"


def test_frozen_parameter_in_the_optimizer_is_watched_after_its_step(net):
    net[1].requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    writes = watching(net, optimizer)
    step(net, optimizer)
    net[1].weight.data.mul_(0.5)
    assert writes.check()


def test_step_that_is_skipped_and_writes_all_the_same_is_found(net):
    class Decays(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                net[0].weight.mul_(0.9)
            return super().step(closure)

    optimizer = Decays(net.parameters(), lr=0.1)
    writes = watching(net, optimizer, skips=lambda _: True)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    optimizer.step()
    assert writes.check()


def test_closed_watch_leaves_no_hook_on_the_optimizer(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = len(optimizer._optimizer_step_post_hooks)
    watching(net, optimizer).close()
    assert len(optimizer._optimizer_step_post_hooks) == before
