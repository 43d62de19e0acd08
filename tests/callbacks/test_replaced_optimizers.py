"""Programs that replace their optimizer, or write its state, in a fit: no fault of theirs."""

import pytest
import torch

from lit_stability import read_incidents, stability_callbacks
from tests.conftest import Regression, fit, flat


def replace(module, *optimizers):
    module.trainer.strategy.optimizers = list(optimizers)


class SwitchesToLBFGS(Regression):
    """Adam first, then L-BFGS with a line search and its learning rate of 1, as in PINA."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 30:
            lbfgs = torch.optim.LBFGS(self.parameters(), max_iter=3, line_search_fn="strong_wolfe")
            replace(self, lbfgs)


class ByHand(Regression):
    """Trains with all the optimizers that there are."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.zero_grad()
        self.manual_backward(loss)
        found = self.optimizers()
        for optimizer in found if isinstance(found, list) else [found]:
            optimizer.step()


class SplitsItsOptimizer(ByHand):
    def on_train_batch_start(self, batch, batch_idx):
        weights = list(self.parameters())
        if self.global_step == 20:
            first = torch.optim.Adam(weights[:2], 1e-3)
            replace(self, first, torch.optim.SGD(weights[2:], 1e-2))
        if self.global_step == 40:
            replace(self, torch.optim.Adam(weights, 1e-3))


class TrainsAnotherTensor(Regression):
    """Ends with an optimizer of a tensor that is no parameter of the module."""

    def __init__(self):
        super().__init__()
        self.shift = [torch.zeros((), requires_grad=True)]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.shift[0].square()

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 30:
            replace(self, torch.optim.SGD(self.shift, 1e-2))


REPLACING = [SwitchesToLBFGS, SplitsItsOptimizer, TrainsAnotherTensor]


@pytest.mark.parametrize("kind", REPLACING)
def test_fit_that_replaces_its_optimizer_is_the_bare_one(kind, tmp_path, caplog):
    bare, _ = fit(tmp_path / "bare", [], kind, max_steps=60)
    suite = stability_callbacks()
    module, trainer = fit(tmp_path / "suite", suite, kind, max_steps=60)
    assert trainer.global_step == 60
    assert torch.equal(flat(module), flat(bare))
    assert suite[0].incidents == []
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert caplog.text.count("are not monitored") == (kind is not SwitchesToLBFGS)


class PrunesItsMoments(Regression):
    """Starts anew with a share of Adam's moments every 40 steps, as in ReLoRA."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step % 40 == 0:
            generator = torch.Generator().manual_seed(self.global_step)
            for state in self.optimizers().state.values():
                kept = torch.rand(state["exp_avg"].shape, generator=generator) > 0.9
                state["exp_avg"].mul_(kept)
                state["exp_avg_sq"].mul_(kept)


def test_moments_that_the_program_writes_cost_one_rollback(tmp_path):
    bare, _ = fit(tmp_path / "bare", [], PrunesItsMoments, max_steps=140)
    suite = stability_callbacks()
    module, trainer = fit(tmp_path / "suite", suite, PrunesItsMoments, max_steps=140)
    assert trainer.global_step == 140
    assert torch.equal(flat(module), flat(bare))
    (incident,) = read_incidents(tmp_path / "suite")
    assert incident["cause"] == "weights written by the program"
    assert sum(r.startswith("rolled back") for r in incident["responses"]) == 1
