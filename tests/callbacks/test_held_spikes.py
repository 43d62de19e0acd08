"""Gradients that are far too large for several steps, while the loss is ordinary."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_stability import stability_callbacks
from tests.conftest import Regression, fit


class Held(Callback):
    """Multiplies the gradients of some steps, however often they are run."""

    def __init__(self, first, steps, factor=1e3):
        self.steps, self.factor = range(first, first + steps), factor

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            torch._foreach_mul_([p.grad for p in pl_module.parameters()], self.factor)


class PlainSGD(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.parametrize(
    ("module", "first", "steps"),
    [(Regression, 60, 20), (PlainSGD, 60, 5), (Regression, 5, 20), (PlainSGD, 3, 5)],
)
def test_they_are_clipped_to_the_usual_norm_and_cost_one_step(module, first, steps, tmp_path):
    """The smallest remedy that is enough: no rollback, no lower learning rate."""
    callbacks = stability_callbacks()
    net, _ = fit(tmp_path, [Held(first, steps), *callbacks], module, max_steps=120)
    (incident,) = callbacks[0].incidents
    assert incident.responses == ["step retried"] + ["gradients clipped"] * steps
    assert incident.outcome == "recovered"
    assert len(net.losses) == 121
    assert callbacks[-1].backoff.lr_factor == callbacks[-1].backoff.clip_factor == 1.0
    twin, _ = fit(tmp_path / "twin", (), module, max_steps=120)
    mean, wanted = (sum(each.losses[-20:]) / 20 for each in (net, twin))
    assert mean == pytest.approx(wanted, rel=0.05)
