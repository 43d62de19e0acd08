"""Changes of a batch: writes into tensors and arrays, other objects, other entries."""

import numpy as np
import pytest
import torch

from lit_stability.trainer_internals.batch_digest import digest_of


class Graph:
    def __init__(self):
        self.x, self.parts = torch.zeros(3), [np.zeros(4), {"n": 1}]


def rebind(graph):
    graph.x = graph.x + 1


CHANGES = {
    "tensor written": lambda g: g.x.add_(1),
    "tensor replaced": rebind,
    "array written": lambda g: np.add(g.parts[0], 1, out=g.parts[0]),
    "array element written": lambda g: g.parts[0].__setitem__(2, 5.0),
    "entry replaced": lambda g: g.parts[1].update(n=2),
    "entry added": lambda g: g.parts[1].update(m=2),
    "entry renamed": lambda g: g.parts[1].update(m=g.parts[1].pop("n")),
    "list shortened": lambda g: g.parts.pop(),
    "list reversed": lambda g: g.parts.reverse(),
    "attribute added": lambda g: setattr(g, "mask", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_change_of_a_batch_is_seen(change):
    graph = Graph()
    before = digest_of(graph)
    assert digest_of(graph) == before
    change(graph)
    assert digest_of(graph) != before


def test_batch_that_is_only_read_has_the_same_digest():
    batch = {"x": torch.rand(3), "nan": float("nan"), "self": None, "a": np.array([1, None])}
    batch["self"] = batch
    before = digest_of(batch)
    batch["x"].sum()
    assert digest_of(batch) == before
