"""C5: the first loss against its formula, with known answers."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_stability.checks.preflight.loss import check_finite, check_initial_loss
from lit_stability.checks.preflight.observation import Observation
from lit_stability.checks.preflight.operations import Watch
from lit_stability.checks.preflight.report import NotApplicableError

LN_10 = math.log(10)


@pytest.mark.parametrize(
    ("loss", "options", "severity"),
    [
        (LN_10, {"classes": 10}, None),
        (LN_10 + 0.5, {"classes": 10}, None),
        (1.5 * LN_10 + 1.1, {"classes": 10}, "warning"),
        (10 * LN_10 + 0.1, {"classes": 10}, "error"),
        (0.51 * LN_10, {"classes": 10}, None),
        (0.49 * LN_10, {"classes": 10}, "warning"),
        (0.49 * LN_10, {"classes": 10, "pretrained": True}, None),
        (20 * LN_10, {"classes": 10, "pretrained": True}, "error"),
        (11 * math.log(2), {"one_vs_rest": 11}, None),
        (1e5, {"one_vs_rest": 151_936}, "note"),
        (1.1e6, {"one_vs_rest": 151_936}, "error"),
    ],
)
def test_initial_loss_with_a_formula_is_judged_by_it(loss, options, severity):
    """C5, C2: ln V, and (K + 1) ln 2; the bounds are 1.5 times and 1 nat more, 10 times, half."""
    found = check_initial_loss(Observation(loss=loss), **options)
    assert [f.severity for f in found] == ([severity] if severity else [])


def observed(logits, labels, loss=0.0, **options):
    watch = Watch(lambda: "head")
    with watch:
        F.cross_entropy(logits, labels, **options)
    return Observation(loss=loss, watch=watch)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}])
def test_initial_loss_of_a_cross_entropy_is_its_own_mean_whatever_the_step_returns(options):
    labels = torch.arange(50) % 10
    seen = observed(torch.zeros(50, 10), labels, loss=1e9, **options)
    assert check_initial_loss(seen) == []
    (call,) = seen.watch.losses
    assert call.mean == pytest.approx(LN_10)
    assert (call.classes, call.targets, call.constant) == (10, 50, True)


def test_initial_loss_of_ignored_targets_is_the_mean_of_the_others():
    labels = torch.tensor([1, -100, 2, -100])
    logits = torch.zeros(4, 10)
    logits[1] = 1e6
    (call,) = observed(logits, labels).watch.losses
    assert (call.targets, call.mean) == (2, pytest.approx(LN_10))


@pytest.mark.parametrize("n", [2, 8, 1000])
def test_initial_loss_of_a_small_batch_may_miss_by_chance(n):
    """Logits of variance 1 miss ln 2 by 0.6 nats and more for a few targets: no finding."""
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        logits, labels = torch.randn(n, 2, generator=g), torch.randint(2, (n,), generator=g)
        assert check_initial_loss(observed(logits, labels)) == []


def test_initial_loss_without_a_formula_says_what_to_give():
    with pytest.raises(NotApplicableError, match="give classes= or one_vs_rest="):
        check_initial_loss(Observation(loss=1.0))


def test_check_finite_names_the_parameters_whose_gradient_is_not():
    seen = Observation(loss=1.0, gradients={"a": 1.0, "b": math.nan, "c": None})
    (found,) = check_finite(seen)
    assert found.where == ("b",)
    assert check_finite(Observation(loss=1.0, gradients={"a": 1.0, "c": None})) == []


def test_large_loss_of_a_guess_over_many_classes_is_called_no_explosion():
    """C3: the first loss over 100,000 of a vocabulary of 151,936 and one."""
    (note,) = check_initial_loss(Observation(loss=1.053e5), one_vs_rest=151_937)
    assert note.severity == "note"
    assert "151937 ln 2 = 1.053e+05" in note.what
    assert "no gradient explodes" in note.why
    assert check_initial_loss(Observation(loss=700.0), one_vs_rest=1025) == []
