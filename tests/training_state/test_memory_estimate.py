"""The memory that the suite will take, against known answers and against what a fit holds."""

import copy

import pytest
import torch
from torch import nn, optim

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    LastKnownGood,
    NonFiniteLocator,
    estimate_memory,
    read_incidents,
)
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit
from tests.foreign_tensors import FOREIGN

OPTIMIZERS = {
    "Adam": lambda p: optim.Adam(p),
    "AdamW amsgrad": lambda p: optim.AdamW(p, amsgrad=True),
    "fused AdamW": lambda p: optim.AdamW(p, fused=True),
    "rate in a tensor": lambda p: optim.AdamW(p, lr=torch.tensor(1e-3)),
    "SGD": lambda p: optim.SGD(p, 1e-2),
    "SGD momentum": lambda p: optim.SGD(p, 1e-2, momentum=0.9),
    "RMSprop centered": lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adamax": lambda p: optim.Adamax(p),
    "NAdam": lambda p: optim.NAdam(p),
    "RAdam": lambda p: optim.RAdam(p),
    "ASGD": lambda p: optim.ASGD(p),
    "Rprop": lambda p: optim.Rprop(p),
    "Adafactor": lambda p: optim.Adafactor(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_foreseen_as_it_is_after_a_step(name, dtype):
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(dtype)
    net[1].bias.requires_grad_(False)
    made = OPTIMIZERS[name](net.parameters())
    weights = copy.deepcopy(net.state_dict())
    foreseen = estimate_memory(net, made)
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net(torch.ones(2, 30, dtype=dtype)).sum().backward()
    made.step()
    assert estimate_memory(net, made) == foreseen


@pytest.mark.parametrize(
    ("change", "snapshot", "frozen"),
    [
        (lambda net: None, 4 * (100 * 3 + 2), 0),
        (lambda net: net.half(), 2 * 100 * 3 + 4 * 2, 0),
        (lambda net: net.weight.requires_grad_(False), 4 * (10 * 3 + 1), 4 * 90),
        (lambda net: net.register_buffer("mask", torch.ones(7)), 4 * (100 * 3 + 2 + 7), 0),
    ],
)
def test_snapshot_of_a_small_net_under_adamw_has_a_known_size(change, snapshot, frozen):
    """Weights and two moments each of 90 + 10 numbers, and two counts of the steps."""
    net = nn.Linear(9, 10)
    change(net)
    found = estimate_memory(net, optim.AdamW([p for p in net.parameters() if p.requires_grad]))
    assert (found.snapshot, found.frozen) == (snapshot, frozen)


def test_net_without_content_is_as_large_as_one_with_it():
    sizes = []
    for device in ("cpu", "meta"):
        net = nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50)).to(device)
        sizes.append(estimate_memory(net, optim.AdamW(net.parameters())))
    assert sizes[0] == sizes[1]


def test_place_of_the_snapshots_moves_them_and_nothing_else():
    net = nn.Linear(100, 100)
    on_device, on_host = (
        estimate_memory(net, snapshot_device=place, batch=torch.ones(10))
        for place in ("device", "host")
    )
    assert on_device.total == on_host.total
    assert on_device.device - on_host.device == 2 * on_device.snapshot
    assert on_device.batches == 40 * 40


def test_shards_divide_weights_and_state_and_replicas_do_not():
    net = nn.Linear(63, 64)
    made = optim.SGD(net.parameters(), 1e-2, momentum=0.9)
    alone, ddp, fsdp2 = (
        estimate_memory(net, made, strategy, ranks=4) for strategy in ("single", "ddp", "fsdp2")
    )
    assert ddp.snapshot == alone.snapshot == 4 * fsdp2.snapshot
    assert (alone.checkpoint > 0, ddp.checkpoint, fsdp2.checkpoint) == (True, 0, 0)


def test_several_optimizers_are_added():
    net = nn.Sequential(nn.Linear(9, 10), nn.Linear(9, 10))
    both = [optim.AdamW(part.parameters()) for part in net]
    one = estimate_memory(net[0], both[0]).snapshot
    assert estimate_memory(net, both).snapshot == 2 * one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fsdp"}, "strategy must be 'single', 'ddp' or 'fsdp2', got 'fsdp'"),
        ({"snapshot_device": "auto"}, "must be 'device' or 'host', got 'auto'"),
        ({"ranks": 0}, "ranks must be a whole number, at least 1, got 0"),
        ({"snapshot_every": 1.5}, "snapshot_every must be a whole number, at least 1, got 1.5"),
    ],
)
def test_bad_argument_is_refused_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(nn.Linear(2, 2), **options)


def test_class_in_the_place_of_an_optimizer_is_refused_with_what_to_write():
    with pytest.raises(TypeError, match=r"is the class AdamW; create it: AdamW\(module.parameters"):
        estimate_memory(nn.Linear(2, 2), optim.AdamW)


def test_optimizer_that_needs_a_closure_is_refused_with_what_to_do():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the state of LBFGS cannot be foreseen") as error:
        estimate_memory(net, optim.LBFGS(net.parameters()))
    assert str(error.value).endswith("call estimate_memory after its first step")


def test_sentence_names_both_memories():
    found = estimate_memory(nn.Linear(1024, 1024), batch=torch.ones(2**10))
    assert str(found) == (
        "The suite takes 12.0 MiB on the device and 4.2 MiB on the host, with two snapshots of "
        "4.0 MiB on the device."
    )


@pytest.mark.parametrize("name", [None, "packed weight", "int8 weight", "quantised buffer"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_estimate_is_what_a_fit_holds(name, tmp_path):
    class Module(Regression):
        def __init__(self):
            super().__init__()
            self.net = self.net if name is None else FOREIGN[name]()

    faults = FaultInjector([NanLoss(step=50)])
    good = LastKnownGood(every_n_steps=10)
    suite = [faults, GradientMonitor(), NonFiniteLocator(), good, AutoRollback()]
    module, trainer = fit(tmp_path, suite, module=Module)
    batch = (torch.ones(16, 8), torch.ones(16))
    # Metrics, generators and indices are not tensors of the module: they are not estimated.
    found = estimate_memory(module, trainer.optimizers[0], batch=batch)
    memory = read_incidents(tmp_path)[0]["memory"]
    assert memory["snapshot_bytes"] == found.snapshot
    assert memory["frozen_bytes"] == found.frozen
    assert memory["incident_bytes"] == found.incident
    assert memory["batch_bytes"] <= found.batches
