"""One pass, watched."""

import pytest
import torch
from torch import nn

from lit_stability.checks.preflight import StepError
from lit_stability.checks.preflight.observation import observe, parts, running
from tests.checks.preflight.nets import Classifier, labelled, seeded, subject


def test_observation_of_a_line_has_the_known_loss_outputs_and_gradients():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, weight in zip(model, (2.0, 3.0), strict=True):
        nn.init.constant_(layer.weight, weight)
    model.register_parameter("unused", nn.Parameter(torch.ones(1)))
    first, second = observe(subject(model, torch.ones(1, 1), lambda m, x: m(x).sum()))
    assert first.loss == pytest.approx(6.0)
    assert {n: o.rms for n, o in first.outputs.items()} == {"0": 2.0, "1": 6.0}
    assert first.gradients == {"0.weight": 3.0, "1.weight": 2.0, "unused": None}
    # Two steps of 0.001 down each gradient's sign.
    assert second.loss == pytest.approx(1.998 * 2.998)


def test_running_names_the_module_also_after_one_has_raised():
    model = seeded(Classifier)
    with running(model) as stack:
        with pytest.raises(RuntimeError, match="shape"):
            model(torch.zeros(2, 3))
        assert stack == []
    assert not model.trunk[0]._forward_hooks


def test_step_that_depends_on_no_weight_is_a_finding():
    made = subject(step=lambda model, batch: batch[0].sum())
    with pytest.raises(StepError, match="depends on no trainable parameter"):
        observe(made)


@pytest.mark.parametrize("output", [None, 1.0, torch.zeros(3)])
def test_step_without_a_scalar_loss_is_a_finding(output):
    with pytest.raises(StepError, match="no scalar loss"):
        subject(step=lambda model, batch: output).loss(seeded(Classifier))


def test_step_that_writes_into_its_batch_is_given_a_copy_each_time():
    batch = labelled()
    before = batch[0].clone()

    def step(model, batch):
        return model(batch[0].mul_(0.0)).sum()

    observe(subject(batch=batch, step=step))
    assert torch.equal(batch[0], before)


def test_parts_look_through_a_lone_wrapper():
    assert list(parts(Classifier())) == ["trunk", "head"]
    assert list(parts(nn.ModuleDict({"model": Classifier()}))) == ["model.trunk", "model.head"]
