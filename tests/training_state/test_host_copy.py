"""A checkpoint copied in memory: equal, apart from the original, in buffers that stay."""

import copy
import threading

import pytest
import torch
from torch import nn

from lit_stability.training_state.host_copy import HostCopy, first_nonfinite, is_finite
from lit_stability.training_state.rng import (
    capture_rng,
    pack_rng,
    restore_rng,
    same_rng,
    unpack_rng,
)
from tests.delayed import ThreadCopies


def checkpoint():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return net, {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"a": {"window": [1.0, 2.0], "none": None}},
        "odd": [torch.zeros(0), torch.ones(2, 3).t(), torch.eye(3).to_sparse(), (torch.tensor(1),)],
    }


def test_copy_is_equal_and_does_not_follow_the_original():
    net, state = checkpoint()
    before = copy.deepcopy(state)
    held = HostCopy()
    held.capture(state)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    state["callbacks"]["a"]["window"].append(3.0)
    assert repr(held.state) == repr(before)
    assert type(held.state["state_dict"]) is type(before["state_dict"])
    assert held.nbytes == sum(
        t.numel() * t.element_size()
        for t in [*before["state_dict"].values(), *before["odd"][:2], before["odd"][3][0]]
        + [v for s in before["optimizer_states"][0]["state"].values() for v in s.values()]
    )


def test_buffers_are_reused_by_their_place_though_others_come_and_go():
    _, state = checkpoint()
    held = HostCopy()
    held.capture(state)
    first = held.state["state_dict"]["0.weight"].data_ptr()
    held.capture({"new": torch.ones(1), **state})
    assert held.state["state_dict"]["0.weight"].data_ptr() == first
    assert torch.equal(held.state["new"], torch.ones(1))


def test_tied_weights_stay_tied_and_are_held_once():
    weight = torch.randn(5, 4)
    held = HostCopy()
    held.capture({"state_dict": {"embedding": weight.detach(), "head": weight.detach()}})
    copies = held.state["state_dict"]
    assert copies["embedding"].data_ptr() == copies["head"].data_ptr() != weight.data_ptr()
    assert held.nbytes == weight.numel() * 4


def test_steady_tensors_are_copied_later_and_all_others_at_once():
    """The caller goes on while weights are copied; a buffer may change right away."""
    released = threading.Event()
    waits = iter([lambda: None, lambda: released.wait(10)])
    held = HostCopy(ThreadCopies(lambda: next(waits)()))
    weight, buffer = torch.ones(3), torch.ones(3)
    state = {"state_dict": {"weight": weight, "buffer": buffer}}
    held.capture(state, steady=[weight])
    assert held.state["state_dict"]["buffer"].tolist() == [1.0] * 3
    buffer.zero_()
    assert not held.written
    released.set()
    held.finish()
    assert held.state["state_dict"]["weight"].tolist() == [1.0] * 3
    assert held.state["state_dict"]["buffer"].tolist() == [1.0] * 3
    weight.detach().add_(1)
    assert held.written


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([1.0, 2.0]), True),
        (torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([float("-inf"), 2.0]), False),
        (torch.tensor([1.0, float("inf")]).bfloat16(), False),
        (torch.tensor([1.0 + 1j, complex("nan")]), False),
        (torch.tensor([1, 2]), True),
        (torch.zeros(0), True),
    ],
)
def test_is_finite(tensor, expected):
    assert is_finite(tensor) is expected


def test_first_nonfinite_looks_at_weights_buffers_and_moments():
    _, state = checkpoint()
    assert first_nonfinite(state) is None
    state["optimizer_states"][0]["state"][1]["exp_avg"][0] = torch.nan
    assert first_nonfinite(state) == "optimizer 0.state.1.exp_avg"
    state["state_dict"]["1.running_var"][0] = torch.inf
    assert first_nonfinite(state) == "1.running_var"
    assert first_nonfinite(state, ["1.running_var"]) == "optimizer 0.state.1.exp_avg"


def test_packed_generators_differ_after_a_single_draw():
    before = capture_rng()
    assert same_rng(before, capture_rng())
    for draw in ("torch.rand(1)", "random.random()", "np.random.rand()"):
        exec(f"import random, numpy as np; {draw}")
        assert not same_rng(before, capture_rng()), draw
        restore_rng(unpack_rng(pack_rng(before)))
        assert same_rng(before, capture_rng()), draw
