"""C3, C5: what tells an untouched layer, and a head at another scale."""

import math

import pytest
import torch
from torch import nn

from lit_stability.checks.preflight.observation import Observation, Output
from lit_stability.checks.preflight.scales import check_initialisation, check_scales, is_default
from tests.checks.preflight.nets import Classifier

INITS = {
    "torch's own": (lambda w: None, True),
    "kaiming_uniform(a=sqrt 5)": (lambda w: nn.init.kaiming_uniform_(w, math.sqrt(5)), True),
    "normal of the same rms": (lambda w: nn.init.normal_(w, std=1 / math.sqrt(3 * 64)), False),
    "xavier": (nn.init.xavier_uniform_, False),
    "xavier of gain 0.1": (lambda w: nn.init.xavier_uniform_(w, 0.1), False),
    "kaiming": (nn.init.kaiming_uniform_, False),
    "orthogonal": (nn.init.orthogonal_, False),
    "zeros": (nn.init.zeros_, False),
    "half the bound": (lambda w: nn.init.uniform_(w, -1 / 16, 1 / 16), False),
    "two values of the same rms": (lambda w: w.data.copy_(w.data.sign() / 8 / 3**0.5), False),
    "trained a little": (lambda w: w.data.add_(torch.randn_like(w) * 0.02), False),
}


@pytest.mark.parametrize(("initialise", "expected"), INITS.values(), ids=INITS)
@pytest.mark.parametrize("seed", range(5))
def test_is_default_knows_torchs_own_initialisation_from_others(initialise, expected, seed):
    """C5: a head left out of the initialisation."""
    torch.manual_seed(seed)
    layer = nn.Linear(64, 48)
    initialise(layer.weight)
    assert is_default(layer.weight) is expected


@pytest.mark.parametrize("shape", [(8, 8), (64, 48), (768, 10), (16, 4096)])
def test_is_default_recognises_nearly_all_draws(shape):
    torch.manual_seed(0)
    hits = sum(is_default(nn.Linear(*shape).weight) for _ in range(200))
    assert hits >= 199


@pytest.mark.parametrize(
    ("rms", "gradient", "found"),
    [
        (1.0, 1.0, []),
        (99.0, 999.0, []),
        (101.0, 1.0, ["warning"]),
        (10_001.0, 1.0, ["error"]),
        (1.0, 1001.0, ["warning"]),
        (0.0, 0.0, []),
    ],
)
def test_scales_of_a_head_are_judged_against_the_trunk(rms, gradient, found):
    """C3: two orders of magnitude for outputs, three for gradients."""
    seen = Observation(
        outputs={"trunk": Output(1.0, True), "head": Output(rms, True)},
        gradients={"trunk.0.weight": 1.0, "head.weight": gradient, "head.bias": None},
    )
    assert [f.severity for f in check_scales(seen, Classifier())] == found


@pytest.mark.parametrize(("loaded", "severity"), [("frozen", "warning"), ("training", "note")])
def test_missed_head_is_held_against_the_heads_that_train_beside_it(loaded, severity):
    """C5: a trunk that was loaded says nothing about how heads should begin."""
    torch.manual_seed(0)
    trunk = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    for layer in trunk:
        nn.init.normal_(layer.weight, std=0.05)
    small, missed = nn.Linear(64, 64), nn.Linear(64, 64)
    nn.init.xavier_uniform_(small.weight, gain=0.1)
    trunk.requires_grad_(loaded == "training")
    model = nn.ModuleDict({"trunk": trunk, "small": small, "missed": missed})
    (found,) = check_initialisation(model)
    assert (found.where, found.severity) == (("missed",), severity)
