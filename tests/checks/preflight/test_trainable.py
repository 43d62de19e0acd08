"""C5: what trains and what is frozen."""

import pytest
import torch
from torch import nn

from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.report import DeclarationError, NotApplicableError
from lit_stability.checks.preflight.trainable import (
    check_frozen,
    check_gradients,
    check_optimized,
    check_registered,
    frozen_modules,
)
from tests.checks.preflight.nets import Classifier


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({"weight": 1.0, "bias": 1.0}, {"weight": 1.0, "bias": 1.0}, ()),
        ({"weight": 0.0, "bias": 0.0}, {"weight": 1.0, "bias": 1.0}, ()),  # behind a head at 0
        ({"weight": 0.0, "bias": 0.0}, {"weight": 0.0, "bias": 0.0}, ("weight", "bias")),
        ({"weight": 1.0, "bias": 0.0}, {"weight": 1.0, "bias": 0.0}, ()),  # before a norm
        ({"weight": 1.0, "bias": None}, {"weight": 1.0, "bias": None}, ("bias",)),
    ],
)
def test_gradients_that_never_come_are_named(first, second, named):
    """C5: what is detached, or behind something dead."""
    found = check_gradients(
        Observation(gradients=first), Observation(gradients=second), nn.Linear(2, 2)
    )
    assert tuple(name for f in found for name in f.where) == named


def test_frozen_patterns_name_every_parameter_that_would_train():
    """C5: a backbone that is not frozen."""
    model = Classifier()
    model.trunk[0].requires_grad_(False)
    errors = [f for f in check_frozen(model, ["trunk.*"]) if f.severity == "error"]
    assert len(errors) == 1
    assert errors[0].where[0] == "trunk.1.weight"
    assert not any(name.startswith(("trunk.0", "head")) for name in errors[0].where)


def test_frozen_pattern_that_fits_nothing_is_refused():
    with pytest.raises(DeclarationError, match=r"frozen='backbone.\*' matches no parameter"):
        check_frozen(Classifier(), ["backbone.*"])


def test_frozen_of_a_model_that_trains_whole_does_not_apply():
    with pytest.raises(NotApplicableError, match="nothing is frozen"):
        check_frozen(Classifier())


@pytest.mark.parametrize(
    ("dropout", "norm", "mode", "effects"),
    [
        (0.5, nn.BatchNorm1d, True, ["running statistics are updated", "dropout is active"]),
        (0.5, nn.BatchNorm1d, False, []),
        (0.0, nn.LayerNorm, True, []),
    ],
)
def test_frozen_module_in_train_mode_is_named_where_that_matters(dropout, norm, mode, effects):
    """T4."""
    model = Classifier(dropout=dropout, norm=norm)
    model.trunk.requires_grad_(False).train(mode)
    found = [f.what.split(": ")[1] for f in check_frozen(model) if f.severity == "warning"]
    assert found == effects


def test_frozen_share_is_counted_in_weights():
    model = nn.Sequential(nn.Linear(9, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].requires_grad_(False)
    (note,) = check_frozen(model)
    assert (note.severity, note.what) == ("note", "1 of 10 weights train, 10 %")


def test_frozen_modules_are_the_outermost_that_hold_parameters():
    model = Classifier()
    model.trunk.requires_grad_(False)
    assert [name for name, _ in frozen_modules(model)] == ["trunk"]


def test_optimizer_of_another_model_is_an_error():
    other = torch.optim.SGD(Classifier().parameters(), 0.1)
    found = check_optimized(Classifier(), [other])
    assert [f.severity for f in found] == ["warning", "error"]
    assert "parameters that are not in the model" in found[1].what


def test_optimizer_with_frozen_parameters_makes_a_note():
    model = Classifier()
    model.head.requires_grad_(False)
    (found,) = check_optimized(model, [torch.optim.SGD(model.parameters(), 0.1)])
    assert (found.severity, found.where) == ("note", ("head.weight", "head.bias"))


def test_optimizers_that_share_the_model_between_them_are_silent():
    model = Classifier()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (model.trunk, model.head)]
    assert check_optimized(model, optimizers) == []


def test_trainable_layers_in_plain_containers_are_named_and_frozen_ones_are_not():
    model = Classifier()
    model.blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    model.trunk.scales = {"first": nn.Parameter(torch.ones(1))}
    model.teacher = [nn.Linear(2, 2).requires_grad_(False)]
    model.body = list(model.trunk.parameters())
    (found,) = check_registered(model)
    assert found.where == ("blocks", "trunk.scales")
    assert "5 trainable parameters" in found.what


def test_module_with_registered_layers_only_is_silent():
    model = Classifier()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    assert check_registered(model) == []
