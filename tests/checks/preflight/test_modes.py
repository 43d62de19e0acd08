"""T4: train() against eval(), with the innermost module that differs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_stability.checks.preflight.modes import check_modes
from tests.checks.preflight.nets import Classifier, seeded, subject
from tests.checks.preflight.zoo import from_zoo


class Scaled(nn.Module):
    def forward(self, x):
        return x * 1.1 if self.training else x


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), Scaled())

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("module", "severity", "where"),
    [
        (Scaled, "warning", "trunk.3"),
        (Wrapped, "warning", "trunk.3.inner.1"),
        (Noise, "note", "trunk.3"),
        (Functional, None, ""),
        (lambda: nn.BatchNorm1d(32), None, ""),
        (lambda: nn.Dropout(0.9), None, ""),
        (nn.Identity, None, ""),
    ],
)
def test_modes_name_the_innermost_module_that_differs(module, severity, where):
    """T4: dropout and BatchNorm differ by design, noise on purpose."""
    model = seeded(Classifier)
    model.trunk[3] = module()
    found = [(f.severity, f.where) for f in check_modes(subject(model))]
    assert found == ([(severity, (where,))] if severity else [])


def test_modes_of_a_recurrent_net_agree_without_its_own_dropout():
    """T4."""
    assert check_modes(from_zoo("recurrent", 0)) == []


def test_modes_that_differ_in_the_step_alone_are_named_as_such():
    """T4."""

    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) * (2.0 if model.training else 1.0)

    (found,) = check_modes(subject(step=step))
    assert found.where == ("training_step",)
