"""The Trainer's clipping with the norm that was measured gives the bits of torch's own."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stability import AutoRollback, GradientMonitor, PrecisionFallback, stability_callbacks
from tests.conftest import Regression, fit, flat, make_trainer, regression_data
from tests.precision import Net, data, fp16

NEVER, SOMETIMES, ALWAYS = 1e3, 2.0, 1e-2


class Deep(Regression):
    """Many small tensors of one shape, which are measured in a stack."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()) for _ in range(10)]
        self.net = nn.Sequential(*blocks, nn.Linear(8, 1))


class Reversed(Deep):
    """The optimizer has the parameters in another order than the module."""

    def configure_optimizers(self):
        return torch.optim.AdamW([*self.parameters()][::-1], 1e-2)


class TwoTypes(Regression):
    """Weights of two widths in one optimizer."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 1).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        more = (self.last(x.double()).squeeze(-1) - y).pow(2).mean()
        return super().training_step(batch, batch_idx) + more.float()


class Outside(Regression):
    """The optimizer holds a parameter that the module does not list."""

    def __init__(self):
        super().__init__()
        self.unlisted = [nn.Parameter(torch.ones(1))]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.unlisted[0] - 3).pow(2).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW([*self.parameters(), *self.unlisted], 1e-2)


class Unused(Regression):
    """A parameter without a gradient."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(8, 8)


class Halves(Regression):
    """Scales its gradients after they are measured, where no version counter shows it."""

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.data.mul_(0.5)


class ByHook(Regression):
    """Clips in its own way."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        for p in self.parameters():
            p.grad.data.mul_(0.5)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def both(root, module=Regression, callbacks=list, **options):
    """Weights after a bare fit, and after one with the suite."""
    fits = []
    for name, suite in (("bare", []), ("suite", stability_callbacks())):
        settings = {"max_steps": 40, **options}
        if "plugins" in settings:
            settings["plugins"] = settings["plugins"]()
        trained, _ = fit(root / name, [*suite, *callbacks()], module, **settings)
        fits.append(flat(trained))
    return fits


@pytest.mark.each_value
@pytest.mark.parametrize("threshold", [NEVER, SOMETIMES, ALWAYS])
@pytest.mark.parametrize("module", [Deep, Reversed, TwoTypes, Outside, Unused, Halves, ByHook])
def test_clipped_fit_with_suite_ends_at_the_same_bits(tmp_path, module, threshold):
    bare, suite = both(tmp_path, module, gradient_clip_val=threshold)
    assert torch.equal(bare, suite)


PRECISIONS = {
    "64-true": {"precision": "64-true"},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "fp16": {"plugins": lambda: fp16()["plugins"]},
}


@pytest.mark.parametrize("threshold", [NEVER, SOMETIMES, ALWAYS])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipped_fit_in_each_precision_ends_at_the_same_bits(tmp_path, precision, threshold):
    options = PRECISIONS[precision]
    bare, suite = both(tmp_path, gradient_clip_val=threshold, **options)
    assert torch.equal(bare, suite)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 3, "gradient_clip_val": SOMETIMES},
    ],
)
def test_clipped_fit_with_other_options_ends_at_the_same_bits(tmp_path, options):
    bare, suite = both(tmp_path, **options)
    assert torch.equal(bare, suite)


def _halve(trainer, pl_module, optimizer):
    for p in pl_module.parameters():
        p.grad.data.mul_(0.5)


class HalvesAfterwards(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        _halve(trainer, pl_module, optimizer)


@pytest.mark.parametrize(
    "callbacks",
    [lambda: [HalvesAfterwards()], lambda: [LambdaCallback(on_before_optimizer_step=_halve)]],
)
def test_gradients_that_another_callback_writes_are_clipped_as_they_are_then(tmp_path, callbacks):
    bare, suite = both(tmp_path, callbacks=callbacks, gradient_clip_val=SOMETIMES)
    assert torch.equal(bare, suite)


class _Norms(TorchDispatchMode):
    """Counts the tensors whose norm is computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_foreach_norm" in func._schema.name:
            self.count += len(args[0])
        return func(*args, **(kwargs or {}))


def norms_in(root, suite, module=Regression):
    """Norms per step, of tensors whose norm is computed in the optimizer's step."""
    mode = _Norms()

    class Counted(module):
        def optimizer_step(self, *args, **kwargs):
            with mode:
                super().optimizer_step(*args, **kwargs)

    fit(root, suite, Counted, max_steps=9, gradient_clip_val=SOMETIMES)
    return mode.count / 9


def test_norm_is_computed_once_if_the_trainer_clips(tmp_path):
    bare = norms_in(tmp_path / "bare", [])
    suite = norms_in(tmp_path / "suite", [GradientMonitor(scan_weights_every=100)])
    assert bare == suite == 6


def test_norm_is_computed_twice_where_a_hook_comes_in_between(tmp_path):
    monitor = [GradientMonitor(scan_weights_every=100)]
    assert norms_in(tmp_path, monitor, Halves) == 12


def test_clipping_is_lightnings_again_after_the_fit(tmp_path):
    trainer = make_trainer(tmp_path, stability_callbacks(), max_steps=5, gradient_clip_val=1.0)
    trainer.fit(Regression(), regression_data())
    assert "clip_grad_by_norm" not in vars(trainer.precision_plugin)


def test_clipping_is_lightnings_again_after_a_fit_that_failed(tmp_path):
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("no such column")
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, stability_callbacks(), gradient_clip_val=1.0)
    with pytest.raises(KeyError):
        trainer.fit(Fails(), regression_data())
    assert "clip_grad_by_norm" not in vars(trainer.precision_plugin)


class _Plugins(Callback):
    """The precision plugins of a fit, and whether their clipping was taken over."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, *args):
        plugin = trainer.precision_plugin
        self.seen[plugin] = "clip_grad_by_norm" in vars(plugin)


def test_clipping_is_taken_over_in_the_new_precision_after_a_fallback(tmp_path):
    plugins = _Plugins()
    module = partial(Net, own_loss=True, lr=3e-2)
    suite = [GradientMonitor(), PrecisionFallback(), AutoRollback(), plugins]
    fit(tmp_path, suite, module, data(targets=2000.0), gradient_clip_val=1.0, **fp16())
    assert [plugin.precision for plugin in plugins.seen] == ["16-mixed", "bf16-mixed"]
    assert [*plugins.seen.values()] == [True, True]
    assert not any("clip_grad_by_norm" in vars(plugin) for plugin in plugins.seen)
