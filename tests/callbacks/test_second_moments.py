"""Second moments of Adam and its kin are held to the bounds of their recursion, up and down."""

import pytest
import torch
from lightning.pytorch import Callback

from lit_stability import AutoRollback, GradientMonitor
from tests.conftest import Regression, fit, flat

OPTIMIZERS = {
    "Adam": (lambda p: torch.optim.Adam(p, 1e-2), "exp_avg_sq"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True), "square_avg"),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, 0.5), "square_avg"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 1e-1), "sum"),
    "Adagrad, weight decay": (lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1), "sum"),
}


class Scales(Callback):
    """Multiplies a second moment once."""

    def __init__(self, key, factor, step=30):
        self.key, self.factor, self.step, self.done = key, factor, step, False

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == self.step and not self.done:
            self.done = True
            trainer.optimizers[0].state[pl_module.net[0].weight][self.key].mul_(self.factor)


def module_of(make):
    class Net(Regression):
        def configure_optimizers(self):
            return make(self.parameters())

    return Net


@pytest.mark.parametrize("factor", [1e6, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_moment_that_its_recursion_does_not_explain_is_restored(name, factor, tmp_path):
    make, key = OPTIMIZERS[name]
    module, monitor = module_of(make), GradientMonitor()
    clean, _ = fit(tmp_path / "clean", [GradientMonitor(), AutoRollback()], module, max_steps=50)
    found, _ = fit(
        tmp_path / "run", [Scales(key, factor), monitor, AutoRollback()], module, max_steps=50
    )
    (incident,) = monitor.incidents
    assert incident.first.kind == "optimizer state"
    assert incident.first.layers[0][0] == "net.0.weight"
    assert flat(found).equal(flat(clean))


class Adafactorish(torch.optim.SGD):
    """Keeps a mean of squares with a decay that no option shows, as Adafactor does."""

    def step(self, closure=None):
        loss = super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            square = p.grad.square()
            self.state[p].setdefault("exp_avg_sq", square.clone()).lerp_(square, 0.2)
        return loss


@pytest.mark.parametrize(
    "make", [*(each for each, _ in OPTIMIZERS.values()), lambda p: Adafactorish(p, 1e-2)]
)
def test_gradients_of_very_different_size_are_within_the_bounds(make, tmp_path):
    """Tenfold and a tenth, in turn, so that no other detector takes them for a spike."""

    class Net(module_of(make)):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (10.0 if batch_idx % 7 else 0.01)

    monitor = GradientMonitor()
    fit(tmp_path, [monitor, AutoRollback()], Net, max_steps=60)
    assert [each.first.kind for each in monitor.incidents if "state" in each.first.kind] == []
