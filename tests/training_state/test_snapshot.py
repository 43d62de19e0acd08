"""A restored state equals the captured one, and training from it repeats exactly."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lit_stability.training_state.rng import capture_rng, restore_rng
from lit_stability.training_state.snapshot import (
    BufferGuard,
    ModuleSnapshot,
    OptimizerSnapshot,
    TensorBank,
)
from lit_stability.training_state.snapshot_rotation import SnapshotRotation

O = torch.optim  # noqa: E741
OPTIMIZERS = {
    "sgd": lambda p: O.SGD(p, 0.05),
    "momentum": lambda p: O.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: O.Adam(p, 0.01),
    "adamw": lambda p: O.AdamW(p, 0.01),
    "amsgrad": lambda p: O.AdamW(p, 0.01, amsgrad=True),
    "tensor lr": lambda p: O.AdamW(p, torch.tensor(0.01), foreach=False),
    "fused": lambda p: O.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: O.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: O.Adagrad(p, 0.05),
    "adadelta": lambda p: O.Adadelta(p, 1.0),
    "rprop": lambda p: O.Rprop(p, 0.01),
    "asgd": lambda p: O.ASGD(p, 0.05),
    "adafactor": lambda p: O.Adafactor(p, 0.01),
    "lbfgs": lambda p: O.LBFGS(p, 0.1, max_iter=3, history_size=4),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(12, 1)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.seen += 1
        return self.head(self.body(x))


def make(name):
    torch.manual_seed(0)
    net = Net()
    return net, OPTIMIZERS[name](net.parameters())


def train(net, optimizer, steps):
    """Train on batches drawn from the global generators; the losses."""
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 6) * random.random() + float(np.random.rand())

        def closure(x=x):
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))
    return losses


def state(net, optimizer):
    everything = [dict(net.named_parameters()), dict(net.named_buffers()), optimizer.state_dict()]
    return copy.deepcopy(everything)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_from_a_restored_state_repeats_itself_bit_for_bit(name, before):
    """S11: with dropout, batch normalization and three generators. At 0 there is no state yet."""
    net, optimizer = make(name)
    train(net, optimizer, before)
    weights, moments = ModuleSnapshot(), OptimizerSnapshot()
    weights.capture(net)
    moments.capture(optimizer)
    generators = capture_rng()
    captured = state(net, optimizer)
    losses = train(net, optimizer, 5)
    first = state(net, optimizer)
    assert not same(captured, first)
    for _ in range(2):  # a snapshot serves more than once
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(math.nan)
        weights.restore()
        moments.restore(optimizer)
        restore_rng(generators)
        assert same(state(net, optimizer), captured)
        assert train(net, optimizer, 5) == losses
        assert same(state(net, optimizer), first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_made_after_the_capture_is_gone_after_the_restore(name):
    net, optimizer = make(name)
    moments = OptimizerSnapshot()
    moments.capture(optimizer)
    empty = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 2)
    moments.restore(optimizer)
    assert same(optimizer.state_dict(), empty)


def test_state_of_one_parameter_made_after_the_capture_is_gone_after_the_restore():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = O.Adam([a, b])
    a.grad = torch.ones(3)
    optimizer.step()
    moments = OptimizerSnapshot()
    moments.capture(optimizer)
    b.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[a]["extra"] = torch.ones(1)
    moments.restore(optimizer)
    assert list(optimizer.state) == [a]
    assert set(optimizer.state[a]) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(optimizer.state[a]["step"]) == 1.0


def test_empty_state_of_a_parameter_is_there_after_the_restore():
    """An optimizer without moments may look its state up all the same."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = O.SGD([a, b], 0.1)
    assert optimizer.state[a] == {}
    moments = OptimizerSnapshot()
    moments.capture(optimizer)
    optimizer.state[b]["extra"] = torch.ones(1)
    moments.restore(optimizer)
    assert optimizer.state == {a: {}}


def test_restore_of_state_that_was_deleted_brings_it_back():
    net, optimizer = make("adamw")
    train(net, optimizer, 3)
    moments = OptimizerSnapshot()
    moments.capture(optimizer)
    before = state(net, optimizer)
    optimizer.state.clear()
    moments.restore(optimizer)
    assert same(state(net, optimizer), before)


def test_restore_puts_group_options_back():
    net, optimizer = make("adamw")
    moments = OptimizerSnapshot()
    moments.capture(optimizer)
    optimizer.param_groups[0].update(lr=9.0, betas=(0.1, 0.2), weight_decay=7.0)
    moments.restore(optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.9, 0.999), 0.01)
    assert group["params"] == list(net.parameters())


def test_restore_reaches_the_very_tensors_that_are_in_use():
    net, optimizer = make("adamw")
    train(net, optimizer, 2)
    weights, moments = ModuleSnapshot(), OptimizerSnapshot()
    weights.capture(net)
    moments.capture(optimizer)
    places = [t.data_ptr() for t in [*net.parameters(), *net.buffers()]]
    places += [optimizer.state[p]["exp_avg"].data_ptr() for p in net.parameters()]
    train(net, optimizer, 2)
    weights.restore()
    moments.restore(optimizer)
    after = [t.data_ptr() for t in [*net.parameters(), *net.buffers()]]
    after += [optimizer.state[p]["exp_avg"].data_ptr() for p in net.parameters()]
    assert after == places


def test_buffers_of_a_bank_are_reused_from_capture_to_capture():
    tensors = [torch.randn(5), torch.randn(3, 4).t(), torch.ones(2, dtype=torch.int64)]
    bank = TensorBank()
    bank.capture(tensors)
    places = [saved.data_ptr() for _, saved in bank.pairs]
    for t in tensors:
        t.add_(1)
    bank.capture(tensors)
    assert [saved.data_ptr() for _, saved in bank.pairs] == places
    assert all(torch.equal(live, saved) for live, saved in bank.pairs)
    assert not {t.data_ptr() for t in tensors} & set(places)


def test_bank_of_other_shapes_starts_from_scratch():
    bank = TensorBank()
    bank.capture([torch.zeros(3)])
    later = torch.ones(4, dtype=torch.float64)
    bank.capture([later])
    later.zero_()
    bank.restore()
    assert later.tolist() == [1.0] * 4
    assert bank.nbytes == 32


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(10)[::2],
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.randn(4).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64),
    ],
)
def test_bank_gives_any_tensor_back(tensor):
    tensor = tensor.clone() if tensor.is_contiguous() else tensor
    before = tensor.clone()
    bank = TensorBank()
    bank.capture([tensor])
    tensor.fill_(1)
    bank.restore()
    assert torch.equal(tensor, before)


def test_tied_weights_stay_tied():
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    before = net[0].weight.detach().clone()
    weights = ModuleSnapshot()
    weights.capture(net)
    with torch.no_grad():
        net[1].weight.fill_(5)
    weights.restore()
    assert net[1].weight is net[0].weight
    assert torch.equal(net[0].weight, before)


def spoil_by_assignment(net):
    net.seen = net.seen + math.nan


def spoil_in_place(net):
    net.seen.fill_(math.nan)


def spoil_through_data(net):
    net.seen.data.fill_(math.nan)


def spoil_with_another_shape(net):
    net.seen = torch.full((7,), math.nan)


def spoil_with_none(net):
    net.seen = None


def spoil_by_forward(net):
    net(torch.full((4, 6), math.nan))


SPOILERS = [
    spoil_by_assignment,
    spoil_in_place,
    spoil_through_data,
    spoil_with_another_shape,
    spoil_with_none,
    spoil_by_forward,
]


@pytest.mark.parametrize("holder", ["snapshot", "guard"])
@pytest.mark.parametrize("spoil", SPOILERS)
def test_buffers_spoilt_in_any_way_come_back(spoil, holder):
    """N1: the running statistics of batch normalization after a batch of NaN."""
    torch.manual_seed(0)
    net = Net()
    guard = BufferGuard(net)
    snapshot = ModuleSnapshot()
    for _ in range(3):  # as at every step
        net(torch.randn(4, 6))
        before = {name: b.clone() for name, b in net.named_buffers()}
        guard.capture()
        snapshot.capture(net)
        spoil(net)
        guard.restore() if holder == "guard" else snapshot.restore()
        assert same(dict(net.named_buffers()), before)


def test_guard_leaves_weights_alone():
    net = Net()
    guard = BufferGuard(net)
    guard.capture()
    with torch.no_grad():
        net.head.weight.fill_(5.0)
    guard.restore()
    assert float(net.head.weight.detach().min()) == 5.0


def test_guard_of_a_module_without_buffers_does_nothing():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    guard = BufferGuard(layer)
    guard.capture()
    guard.restore()
    assert torch.equal(layer.weight, before)
    assert list(layer.buffers()) == []


def flip(weight, bit):
    flat = weight.data.view(-1)
    flat[:1] = (flat[:1].view(torch.int32) ^ (1 << bit)).view(torch.float32)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("frozen", [False, True])
def test_outlier_is_silent_over_training_and_names_a_flipped_weight(name, frozen):
    net, optimizer = make(name)
    net.body.requires_grad_(not frozen)
    snapshot = ModuleSnapshot()
    for _ in range(20):
        snapshot.capture(net)
        assert snapshot.outlier() is None
        train(net, optimizer, 5)
        assert snapshot.outlier() is None
    net.body[0].weight.data[0, 0] = 0.1
    snapshot.capture(net)
    train(net, optimizer, 5)
    assert abs(float(net.body[0].weight.detach()[0, 0])) < 1
    flip(net.body[0].weight, 30)
    found, moved = snapshot.outlier()
    assert found == "body.0.weight"
    assert moved > 1e30


def test_outlier_is_the_one_that_moved_a_thousand_times_more():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    snapshot = ModuleSnapshot()
    snapshot.capture(net)
    with torch.no_grad():
        net["a"].weight += 0.001
        net["b"].bias[1] += 0.9
    assert snapshot.outlier() is None
    assert snapshot.outlier(factor=500) == ("b.bias", pytest.approx(0.9, rel=1e-5))
    with torch.no_grad():
        net["b"].bias[1] += 0.3
    assert snapshot.outlier() == ("b.bias", pytest.approx(1.2, rel=1e-5))


def test_drift_is_the_largest_change_by_parameter():
    net = nn.Linear(2, 2)
    snapshot = ModuleSnapshot()
    snapshot.capture(net)
    with torch.no_grad():
        net.weight[1, 0] -= 0.5
    assert snapshot.drift() == {"weight": pytest.approx(0.5), "bias": 0.0}


def test_restored_generators_draw_the_same_numbers():
    saved = capture_rng()

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw()
    assert draw() != first
    restore_rng(saved)
    assert draw() == first


def run_generations(events, confirm_after=3):
    """Feed 's'napshot, 'h'ealthy, 'd'iscard, 'c'onfirm; the confirmed one after each event."""
    generations = SnapshotRotation(make=dict, confirm_after=confirm_after)
    seen = []
    for i, event in enumerate(events):
        if event == "s":
            generations.begin()["at"] = i
        elif event == "h":
            generations.healthy()
        elif event == "d":
            generations.discard()
        else:
            generations.confirm_now()
        confirmed = generations.confirmed
        seen.append("-" if confirmed is None else str(confirmed["at"]))
    return "".join(seen)


@pytest.mark.parametrize(
    ("events", "confirmed"),
    [
        ("hhh", "---"),
        ("shhh", "---0"),
        ("sc", "-0"),
        ("schhshhh", "-0000004"),
        ("scshhdhhhh", "-000000000"),
        ("scshhshhh", "-00000005"),  # begun again before it was confirmed: the count restarts
        ("scshhhshhh", "-000022226"),
        ("d", "-"),
        ("c", "-"),
    ],
)
def test_generations_trust_a_candidate_after_enough_healthy_steps(events, confirmed):
    assert run_generations(events) == confirmed


def test_generations_make_two_snapshots_and_no_more():
    made = []
    generations = SnapshotRotation(make=lambda: made.append(0) or {}, confirm_after=1)
    for i in range(20):
        generations.begin()["at"] = i
        if i % 5 == 3:
            generations.discard()
        generations.healthy()
    assert len(made) == 2


def test_generations_never_write_into_the_confirmed_one():
    generations = SnapshotRotation(make=dict, confirm_after=2)
    for i in range(30):
        confirmed = generations.confirmed
        begun = generations.begin()
        assert begun is not confirmed
        begun["at"] = i
        for _ in range(i % 4):
            generations.healthy()
        if i % 7 == 0:
            generations.discard()
