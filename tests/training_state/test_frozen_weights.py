"""Which weights stand still, and what is kept of them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_stability.training_state.frozen_weights import FrozenWeights
from lit_stability.training_state.snapshot import ModuleSnapshot


def make():
    """A frozen body with a head that trains."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(64, 64), "head": nn.Linear(64, 2)})
    net["body"].requires_grad_(False)
    return net


def two(net):
    """Two snapshots as a run has them, the second taken after the first."""
    frozen = FrozenWeights()
    snapshots = [ModuleSnapshot(frozen) for _ in range(2)]
    snapshots[0].capture(net)
    return frozen, snapshots


def test_frozen_weights_are_held_once_for_all_snapshots():
    net = make()
    frozen, (first, second) = two(net)
    second.capture(net)
    body, head = (sum(4 * p.numel() for p in net[name].parameters()) for name in ("body", "head"))
    assert frozen.nbytes == body
    assert (first.bank.nbytes, second.bank.nbytes) == (head, head)


def moved_in_place(p):
    p.mul_(0.9)


def moved_through_data(p):
    p.data.mul_(0.9)


def moved_by_assignment(p):
    p.data = p.data * 0.9


@pytest.mark.parametrize("move", [moved_in_place, moved_through_data, moved_by_assignment])
@pytest.mark.parametrize("back_to", [0, 1])
def test_frozen_weights_that_move_come_back_as_each_snapshot_saw_them(move, back_to):
    """The teacher of a self-distillation requires no gradient, and moves with every step."""
    net = make()
    _, snapshots = two(net)
    states = [{n: p.detach().clone() for n, p in net.named_parameters()}]
    for _ in range(2):
        with torch.no_grad():
            for parameter in net["body"].parameters():
                move(parameter)
        snapshots[1].capture(net)
    states.append({n: p.detach().clone() for n, p in net.named_parameters()})
    with torch.no_grad():
        for parameter in net.parameters():
            move(parameter)
    snapshots[back_to].restore()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, states[back_to][name])


def test_damage_to_frozen_weights_is_mended_from_the_copy():
    net = make()
    _, (_, second) = two(net)
    second.capture(net)
    before = net["body"].weight.clone()
    net["body"].weight.data[3, 7] = float("nan")
    second.restore()
    assert torch.equal(net["body"].weight, before)


def test_weights_that_moved_are_held_by_the_snapshots_alone():
    net = make()
    frozen, (_, second) = two(net)
    moved_through_data(net["body"].weight)
    second.capture(net)
    assert frozen.nbytes == 4 * net["body"].bias.numel()


def test_frozen_weights_with_nan_in_them_stand_still():
    net = make()
    with torch.no_grad():
        net["body"].weight[0] = float("nan")
    frozen, (_, second) = two(net)
    held = frozen.nbytes
    second.capture(net)
    assert frozen.nbytes == held > 0


def test_unfrozen_weights_are_copied_from_then_on():
    net = make()
    frozen, (first, second) = two(net)
    net["body"].requires_grad_(True)
    second.capture(net)
    assert frozen.nbytes == 0
    before = net["body"].weight.detach().clone()
    with torch.no_grad():
        net["body"].weight.add_(1.0)
    second.restore()
    assert torch.equal(net["body"].weight, before)
    first.restore()
    assert torch.equal(net["body"].weight, before)


@pytest.fixture
def mesh():
    """A mesh of one rank, this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_frozen_shards_are_held_once_and_come_back(mesh):
    """FSDP2 has them as DTensors."""
    net = make()
    for layer in net.values():
        fully_shard(layer, mesh=mesh)
    assert type(net["body"].weight) is DTensor
    before = net["body"].weight.full_tensor().clone()
    frozen, (first, second) = two(net)
    second.capture(net)
    assert frozen.nbytes == 4 * (64 * 64 + 64)
    assert (first.bank.nbytes, second.bank.nbytes) == (520, 520)
    with torch.no_grad():
        net["body"].weight.to_local().mul_(2.0)
    second.restore()
    assert torch.equal(net["body"].weight.full_tensor(), before)


def test_module_with_weights_without_content_is_captured_and_restored():
    net = make()
    net["absent"] = nn.Linear(4, 4, device="meta").requires_grad_(False)
    _, snapshots = two(net)
    with torch.no_grad():
        net["head"].bias.fill_(3.0)
    snapshots[0].restore()
    assert not (net["head"].bias == 3.0).any()
    assert snapshots[0].outlier() is None
