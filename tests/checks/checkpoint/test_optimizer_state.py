"""Which parameter an optimizer's entry belongs to: certain, or unnamed; and what it says."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lit_stability.checks.checkpoint import examine
from lit_stability.checks.checkpoint.optimizer_state import name_entries, ratio_bound
from tests.checks.checkpoint.examples import Mixed, checkpoint_of, read


def stepped(model, optimizer):
    """A checkpoint of the two, after a step with a gradient everywhere it is wanted."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def names_of(checkpoint):
    named = name_entries(checkpoint["optimizer_states"], checkpoint["state_dict"])
    return [named[key] for key in sorted(named)]


def mlp(*widths):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def two_groups(model, first):
    inside = [p for p in model.parameters() if first(p)]
    outside = [p for p in model.parameters() if not first(p)]
    return torch.optim.AdamW([{"params": inside}, {"params": outside}])


CERTAIN = {
    "all": lambda m: torch.optim.Adam(m.parameters()),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "decayed first": lambda m: two_groups(m, lambda p: p.ndim > 1),
    "biases first": lambda m: two_groups(m, lambda p: p.ndim < 2),
    "head alone": lambda m: torch.optim.Adam(m[2].parameters()),
    "named backwards": lambda m: torch.optim.Adam(list(m.named_parameters())[::-1]),
}


@pytest.mark.parametrize("optimizer", CERTAIN)
def test_entry_is_named_where_one_order_fits(optimizer):
    """Weights of (4, 4), (4, 4) and (2, 4): alike, but in their places."""
    model = mlp(4, 4, 4, 2)
    made = CERTAIN[optimizer](model)
    checkpoint = stepped(model, made)
    truth = {id(p): n for n, p in model.named_parameters()}
    expected = [truth[id(p)] for group in made.param_groups for p in group["params"]]
    assert names_of(checkpoint) == expected


AMBIGUOUS = {
    "one of two alike": lambda m: torch.optim.Adam(m[1].parameters()),
    "the last two of three": lambda m: torch.optim.Adam(m[1:].parameters()),
}


@pytest.mark.parametrize("optimizer", AMBIGUOUS)
def test_entry_is_unnamed_where_two_orders_fit(optimizer):
    model = mlp(4, 4, 4, 4)
    checkpoint = stepped(model, AMBIGUOUS[optimizer](model))
    assert names_of(checkpoint) == []
    report = examine(checkpoint)
    assert {each.name.split()[0] for each in report.moments} == {"unnamed"}
    assert [(f.severity, f.what) for f in report.findings] == [("note", "unnamed moments")]


def test_entries_are_named_one_by_one_where_only_some_are_certain():
    """The first of two alike is left out; what follows has a shape of its own."""
    model = mlp(4, 4, 4, 2)
    checkpoint = stepped(model, torch.optim.Adam(model[1:].parameters()))
    assert names_of(checkpoint) == ["2.weight", "2.bias"]
    assert [each.name for each in examine(checkpoint).moments] == [
        *("unnamed 0", "unnamed 1", "2.weight", "2.bias")
    ]


def test_shapes_that_do_not_fit_at_all_are_unnamed():
    model = mlp(4, 4)
    checkpoint = stepped(model, torch.optim.Adam(model.parameters()))
    assert names_of({**checkpoint, "state_dict": mlp(3, 3).state_dict()}) == []


def test_two_optimizers_share_the_model():
    model = mlp(4, 4, 4, 2)
    first = stepped(model, torch.optim.Adam(model[:2].parameters()))["optimizer_states"]
    second = stepped(model, torch.optim.Adam(model[2].parameters()))["optimizer_states"]
    named = name_entries([*first, *second], model.state_dict())
    assert named[1, 0] == "2.weight"
    assert [named[0, i] for i in range(4)] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_tied_frozen_and_buffers_of_a_real_fit_are_seen_through(tmp_path):
    """Two groups, a tied head, a frozen layer whose shapes occur nowhere else."""
    moments = examine(read(checkpoint_of(tmp_path))).moments
    truth = [n for n, p in Mixed().named_parameters() if p.requires_grad]
    assert sorted(each.name for each in moments) == sorted(truth)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.99)])
def test_ratio_bound_is_reached_by_the_worst_gradients_and_never_passed(betas):
    """By Cauchy and Schwarz the worst are those that grow by b2 / b1 with each step."""
    b1, b2 = betas
    bound = ratio_bound(betas)
    m = v = torch.zeros((), dtype=torch.float64)
    grows = b2 / b1 if b1 else 1e3
    for k in range(50):
        g = torch.tensor(grows**k, dtype=torch.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        assert float(m / v.sqrt()) <= bound * (1 + 1e-9)
    assert float(m / v.sqrt()) == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("betas", [None, (0.9, 0.8), (1.0, 0.999), (0.9, 1.0), (0.9,)])
def test_ratio_has_no_bound_for_betas_without_one(betas):
    assert ratio_bound(betas) is None


def test_signal_of_a_constant_gradient_is_one_at_every_step():
    model = mlp(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(5):
        checkpoint = stepped(model, optimizer)
        for moment in examine(checkpoint).moments:
            assert moment.signal == pytest.approx(1.0, rel=1e-5)


def test_numbers_of_an_entry_are_known():
    model = mlp(2, 2)
    moment = examine(stepped(model, torch.optim.Adam(model.parameters()))).moments[0]
    assert (moment.step, moment.elements, moment.optimizer, moment.index) == (1.0, 4, 0, 0)
    assert moment.norms["exp_avg"] == pytest.approx(0.2)
    assert moment.norms["exp_avg_sq"] == pytest.approx(2e-3)
    assert moment.ratio == pytest.approx(0.1 / math.sqrt(1e-3), rel=1e-5)
    assert moment.dtypes == {"exp_avg": "float32", "exp_avg_sq": "float32"}
