"""T4: a few samples by heart."""

import pytest
import torch

from lit_stability.checks.preflight import Memorise
from lit_stability.checks.preflight.memorise import check_memory, take
from lit_stability.checks.preflight.report import NotApplicableError
from models.translation.batches import Batch
from tests.checks.preflight.nets import Classifier, labelled, seeded, subject

PLAN = Memorise(samples=20, steps=120, lr=1e-2)


def test_twenty_samples_are_learnt_by_heart_through_heavy_dropout():
    """T4: dropout is off meanwhile."""
    model = seeded(Classifier, dropout=0.9)
    assert check_memory(subject(model), PLAN) == []


def test_samples_with_contradicting_labels_are_not_learnt():
    """T4: 20 equal inputs with all ten labels keep a loss of ln 10."""
    x, _ = labelled(20)
    (found,) = check_memory(subject(batch=(x[:1].expand(20, -1), torch.arange(20) % 10)), PLAN)
    assert "20 samples are not memorised" in found.what
    assert " to 2.3" in found.what


def test_memory_is_only_asked_for():
    with pytest.raises(NotApplicableError, match="memorise=Memorise"):
        check_memory(subject(), None)


def test_take_cuts_the_samples_of_every_kind_of_batch():
    x = torch.zeros(8, 3)
    cut = take({"x": x, "pair": Batch(x, x), "texts": list("abcdefgh"), "n": 8, "w": x[:5]}, 2)
    assert (len(cut["x"]), len(cut["pair"].source_BS), cut["texts"]) == (2, 2, ["a", "b"])
    assert (cut["n"], len(cut["w"])) == (8, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 must be greater"),
        ({"fraction": 1.0}, "fraction=1.0 must be between"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_memorise_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Memorise(**options)
