"""Parameters listed twice, overlapping, or equal without being one."""

import warnings

import torch
from torch import nn

from lit_stability.checks.preflight.sharing import check_copies, check_duplicates
from tests.checks.preflight.nets import Classifier


def test_parameter_twice_in_one_group_is_named():
    model = Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of it too, and goes on
        optimizer = torch.optim.SGD([*model.parameters(), model.head.bias], 0.1)
    (found,) = check_duplicates(model, [optimizer])
    assert found.what == "1 parameter listed twice in one optimizer"
    assert found.where == ("head.bias",)


def test_tied_weights_given_once_are_silent():
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Linear(4, 9, bias=False)})
    model["b"].weight = model["a"].weight
    assert check_duplicates(model, [torch.optim.SGD(model.parameters(), 0.1)]) == []
    assert check_copies(model) == []


def test_parameters_over_the_same_memory_are_named():
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Linear(4, 9, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    (found,) = check_copies(model)
    assert (found.severity, found.where) == ("warning", ("a.weight = b.weight",))


def test_equal_matrices_make_a_note_and_equal_gains_none():
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model[2].load_state_dict(model[0].state_dict())
    model.extend([nn.LayerNorm(4), nn.LayerNorm(4)])
    (found,) = check_copies(model)
    assert (found.severity, found.where) == ("note", ("0.weight = 2.weight",))
