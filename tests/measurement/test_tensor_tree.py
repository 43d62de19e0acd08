"""The tensors of batches that are objects: with slots, inside of one another, with a way back."""

import weakref
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_stability.measurement.tensor_tree import named_tensors, size_of, tensors_in


@dataclass
class Plain:
    x: Any
    y: Any = None


@dataclass(slots=True)
class Slots:
    x: Any
    y: Any = None


class Base:
    __slots__ = ("x",)


class Derived(Base):
    __slots__ = "y"

    def __init__(self, x, y):
        self.x, self.y = x, y


class Named(NamedTuple):
    x: Any
    y: Any = None


class Store(UserDict):
    """As graph packages keep attributes: a mapping, with a weak reference back."""

    def __init__(self, parent, values):
        super().__init__(values)
        self.parent = weakref.ref(parent)


class Graph:
    def __init__(self, **values):
        self.store = Store(self, values)
        self.owner = self


def three(kind):
    return kind(torch.zeros(3), torch.zeros(2))


CASES = {
    "plain": (three(Plain), 5),
    "slots": (three(Slots), 5),
    "slots of a base": (three(Derived), 5),
    "named tuple": (three(Named), 5),
    "ordered": (OrderedDict(a=torch.zeros(5)), 5),
    "graph": (Graph(x=torch.zeros(3), edges=torch.zeros(2, dtype=torch.long)), None),
    "plain in plain": (Plain(three(Plain), torch.zeros(1)), 6),
    "slots in slots in a list": ([Slots(three(Slots), torch.zeros(1))], 6),
    "slots in a dict in plain": (Plain({"g": three(Slots)}), 5),
    "text and numbers": (Plain("text", 3), 0),
    "nothing": (None, 0),
}


@pytest.mark.parametrize(("batch", "count"), CASES.values(), ids=CASES)
def test_tensors_of_a_batch_are_all_found(batch, count):
    found = list(tensors_in(batch))
    if count is None:
        assert sorted(t.numel() for t in found) == [2, 3]
        assert size_of(batch) == 12 + 16
    else:
        assert sum(t.numel() for t in found) == count
        assert size_of(batch) == 4 * count


def test_tensor_is_named_by_its_path():
    batch = {"g": Slots(Plain(torch.zeros(1)), [torch.zeros(1)])}
    assert [n for n, _ in named_tensors(batch)] == ["batch['g'].x.x", "batch['g'].y[0]"]


def test_what_a_batch_only_refers_to_is_no_part_of_it():
    data = TensorDataset(torch.zeros(1000))
    batch = Plain(torch.zeros(3), [data, nn.Linear(100, 100), torch.float32, len, Tensor])
    assert size_of(batch) == 12


def test_slot_that_was_never_set_is_left_out():
    empty = Derived.__new__(Derived)
    assert list(tensors_in(empty)) == []
