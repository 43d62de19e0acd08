"""Values in attributes: which are copied, and what is restored."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import nn

from lit_stability.trainer_internals import PlainAttributes


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.scale, self.mode, self.ready = 0, 1.0, "warm", False
        self.counts, self.last, self.names = torch.zeros(3), None, ["a"]


def change(owner):
    owner.seen += 1
    owner.scale = float("nan")
    owner.mode, owner.ready, owner.last = "cold", True, torch.ones(2)
    owner.counts += 1
    owner.added = 7
    owner.names.append("b")


def test_numbers_flags_texts_and_tensors_are_restored_and_new_ones_removed():
    owner = Owner()
    counts, attributes = owner.counts, PlainAttributes([owner])
    attributes.capture()
    change(owner)
    attributes.restore()
    assert (owner.seen, owner.scale, owner.mode, owner.ready) == (0, 1.0, "warm", False)
    assert owner.last is None
    assert owner.counts is counts
    assert owner.counts.tolist() == [0, 0, 0]
    assert not hasattr(owner, "added")
    assert owner.names == ["a", "b"], "what a list holds is not known"


def test_replaced_tensor_comes_back_with_its_values():
    owner, before = Owner(), None
    attributes = PlainAttributes([owner])
    attributes.capture()
    before = owner.counts
    owner.counts += 1
    owner.counts = owner.counts + 1
    attributes.restore()
    assert owner.counts is before
    assert owner.counts.tolist() == [0, 0, 0]


def test_changes_are_named_and_nothing_else():
    owner = Owner()
    attributes = PlainAttributes([owner])
    attributes.capture()
    assert attributes.changed() == ()
    change(owner)
    flags = {"Owner.seen", "Owner.mode", "Owner.ready", "Owner.last"}
    assert {*attributes.changed(flags_only=True)} == flags
    assert {*attributes.changed()} == flags | {"Owner.scale", "Owner.counts"}


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2**22 + 1), torch.ones(2, requires_grad=True) * 2, {"a": 1}],
    ids=["large tensor", "tensor with a graph", "dict"],
)
def test_large_tensors_graphs_and_containers_are_not_copied(value):
    owner = Owner()
    owner.value = value
    attributes = PlainAttributes([owner])
    attributes.capture()
    owner.value = 3
    attributes.restore()
    assert not hasattr(owner, "value") or owner.value == 3


def test_attributes_of_torch_and_lightning_are_left_alone():
    class Module(LightningModule):
        pass

    class Finetuning(BaseFinetuning):
        pass

    class Plain(Callback):
        pass

    module, finetuning, plain = Module(), Finetuning(), Plain()
    finetuning._restarting, plain._done = False, False
    attributes = PlainAttributes([module, finetuning, plain])
    attributes.capture()
    module.eval()
    module._automatic_optimization = False
    finetuning._restarting = plain._done = True
    attributes.restore()
    assert not module.training
    assert not module._automatic_optimization
    assert finetuning._restarting
    assert not plain._done


@pytest.mark.parametrize(
    "change",
    [
        lambda owner: setattr(owner, "seen", 1),
        lambda owner: setattr(owner, "added", 2.0),
        lambda owner: setattr(owner, "table", torch.ones(3)),
        lambda owner: owner.table.add_(1),
        lambda owner: owner.counts.data.add_(1),
    ],
    ids=["replaced", "added", "other tensor", "written in place", "written through data"],
)
def test_second_capture_copies_what_has_changed_since_the_first(change):
    owner = Owner()
    owner.table = torch.zeros(10_000)
    attributes = PlainAttributes([owner])
    attributes.capture()
    change(owner)
    attributes.capture()
    wanted = {n: getattr(owner, n, None) for n in ("seen", "table", "counts", "added")}
    wanted = copy.deepcopy(wanted)
    owner.seen, owner.added = -1, -1
    owner.table.fill_(9)
    owner.counts.fill_(9)
    attributes.restore()
    assert all(same(getattr(owner, n, None), value) for n, value in wanted.items())


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
