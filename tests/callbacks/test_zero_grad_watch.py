"""A warning of gradients that are never zeroed, in manual and in automatic optimization."""

import pytest
import torch
from torch import nn

from lit_stability import stability_callbacks
from tests.conftest import Regression, fit, lines_of

LINE = "step 10: the gradients were not zeroed in the last 10 steps"


class Manual(Regression):
    """Steps its optimizer itself; zeroes the gradients in one of several ways, or not."""

    def __init__(self, how):
        super().__init__("sgd")
        self.how, self.automatic_optimization = how, False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])
        if self.how == "two passes":
            self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        optimizer.step()
        if self.how in ("to None", "to 0", "two passes"):
            optimizer.zero_grad(set_to_none=self.how == "to None")
        if self.how == "by data":
            for parameter in self.net.parameters():
                parameter.grad.data.zero_()


class Automatic(Regression):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


class TwoOptimizers(Manual):
    """The backward pass of the second one does not reach the first, which is zeroed with 0."""

    def __init__(self):
        super().__init__("to 0")
        self.other = nn.Linear(8, 1)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 1e-3) for net in (self.net, self.other)]

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad(set_to_none=False)
            self.manual_backward(nn.functional.mse_loss(net(batch[0]).squeeze(-1), batch[1]))
            optimizer.step()


@pytest.mark.parametrize("make", [lambda: Manual("never"), Automatic])
def test_gradients_that_are_never_zeroed_are_warned_of_once(make, tmp_path, caplog):
    fit(tmp_path, stability_callbacks(), make, max_steps=30)
    assert len([line for line in lines_of(caplog) if line.startswith(LINE)]) == 1


@pytest.mark.parametrize(
    "make",
    [
        *(lambda how=how: Manual(how) for how in ("to None", "to 0", "by data", "two passes")),
        Regression,
        TwoOptimizers,
    ],
)
def test_gradients_that_are_zeroed_in_any_way_are_silent(make, tmp_path, caplog):
    fit(tmp_path, stability_callbacks(), make, max_steps=30)
    assert not any("not zeroed" in line for line in lines_of(caplog))
