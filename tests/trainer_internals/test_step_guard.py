"""The guard around `strategy.training_step` by itself; with the suite: test_raising_models.py."""

import pytest
import torch
from lightning.pytorch import Callback

from lit_stability.trainer_internals import AroundNextStep, StepGuard, step_failure
from lit_stability.trainer_internals.step_guard import zero_loss
from tests.conftest import Regression, fit, flat


class Guarded(Callback):
    """Installs a guard that goes on after every exception."""

    def __init__(self, goes_on=True):
        self.goes_on, self.failures, self.passed = goes_on, [], 0

    def on_train_start(self, trainer, pl_module):
        self.guard = StepGuard(trainer, pl_module, self.contain, self.count)

    def contain(self, failure):
        self.failures.append(failure)
        return self.goes_on

    def count(self):
        self.passed += 1

    def on_train_batch_start(self, trainer, *args):
        self.guard.batch_started()
        self.guard.failure = None

    def on_train_batch_end(self, trainer, *args):
        assert (step_failure(trainer) is not None) == bool(self.guard.failure)

    def on_train_end(self, trainer, pl_module):
        self.guard.remove()
        assert step_failure(trainer) is None


class Breaks(Regression):
    """Raises at batch 3, in another mode than before and with fewer trainable parameters."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            self.net.eval()
            self.net[0].requires_grad_(False)
            raise ValueError("nan")
        assert self.net.training
        assert self.net[0].weight.requires_grad
        return super().training_step(batch, batch_idx)


def test_guard_goes_on_with_a_loss_of_zero_and_restores_modes(tmp_path):
    guarded = Guarded()
    fit(tmp_path, [guarded], Breaks, max_steps=10)
    (failure,) = guarded.failures
    assert failure.error == "ValueError: nan"
    assert failure.place.startswith("test_step_guard.py:")
    assert len(failure.batch[0]) == 16
    assert guarded.passed == 9


def test_guard_that_does_not_go_on_raises_the_exception_itself(tmp_path):
    with pytest.raises(ValueError, match="nan") as caught:
        fit(tmp_path, [Guarded(goes_on=False)], Breaks, max_steps=10)
    assert caught.traceback[-1].path.name == "test_step_guard.py"


def test_guard_changes_nothing_of_a_healthy_fit(tmp_path):
    guarded, _ = fit(tmp_path, [Guarded()], max_steps=20)
    bare, _ = fit(tmp_path, max_steps=20)
    assert torch.equal(flat(guarded), flat(bare))


def test_guard_works_below_and_above_another_patch(tmp_path):
    entered = []

    class Context:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *error):
            assert error == (None, None, None)

    class Around(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx in (3, 9):
                self.around = AroundNextStep(trainer, Context)

        def on_train_end(self, trainer, pl_module):
            self.around.remove()

    guarded = Guarded()
    _, trainer = fit(tmp_path, [guarded, Around()], Breaks, max_steps=10)
    assert len(guarded.failures) == 1
    assert entered == [True, True]
    assert "training_step" not in vars(trainer.strategy)


def test_zero_loss_of_any_parameters_has_zero_gradients():
    module = torch.nn.Module()
    module.scalar = torch.nn.Parameter(torch.tensor(torch.nan))
    module.matrix = torch.nn.Parameter(torch.full((2, 3), torch.inf))
    module.short = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    module.imaginary = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    module.empty = torch.nn.Parameter(torch.ones(0, 3))
    module.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    loss = zero_loss(module)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in module.named_parameters():
        if name == "frozen":
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
