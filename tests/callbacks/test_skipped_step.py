"""What a skipped step leaves behind suits every later hook, and the run goes on as without it."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lit_stability import (
    AdaptiveGradientClipping,
    AutoRollback,
    GradientMonitor,
    StabilityCallback,
    stability_callbacks,
)
from lit_stability.faults import CorruptGradient, FaultInjector, NanLoss, ScaleGradients
from lit_stability.policies.actions import SkipStep
from lit_stability.policies.clip_rules import FixedClip
from tests.conftest import Regression, by_hand, fit, flat
from tests.precision import fp16


def norms_of(module):
    """Gradient norms as user code reads them: without asking whether there is a gradient."""
    return torch.stack([p.grad.norm() for p in module.parameters()])


def clipping(clip):
    """A module that clips by its own code."""

    class Clips(Regression):
        def configure_gradient_clipping(self, optimizer, *args, **options):
            clip([p for group in optimizer.param_groups for p in group["params"]])

    return Clips


class ReadsGradients(Regression):
    """Reads gradients in every hook that may see them, between backward and ``zero_grad``."""

    def on_after_backward(self):
        norms_of(self)

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, norm_type=2))
        self.seen = [*getattr(self, "seen", []), norms_of(self)]

    def on_before_zero_grad(self, optimizer):
        if self.trainer.global_step:
            norms_of(self)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        norms_of(self)


class AddsNoise(Regression):
    """Adds to every gradient right before the step."""

    def configure_gradient_clipping(self, optimizer, *args, **options):
        for parameter in self.parameters():
            parameter.grad.add_(1e-3)


class Lbfgs(Regression):
    def __init__(self):
        super().__init__(dropout=0.0)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 1e-2, max_iter=3)


class ReadsByHand(by_hand(Regression)):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.logged = float(norms_of(self).norm())
        return loss


class CompiledStep(Regression):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer


class Fused(Regression):
    def __init__(self):
        super().__init__(optimizer="fused")


class OwnStep(Regression):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(optimizer_closure)


class Sparse(Regression):
    """An embedding with sparse gradients among the weights."""

    def __init__(self):
        super().__init__(optimizer="sgd")
        self.table = nn.Embedding(50, 8, sparse=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        index = (x[:, 0].abs() * 10).long().clamp(max=49)
        return super().training_step((x + self.table(index), y), batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


CASES = {
    "norm": (Regression, {"gradient_clip_val": 1.0}),
    "value": (Regression, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "norm fp16": (Regression, {"gradient_clip_val": 1.0, "precision": "16-mixed"}),
    "value fp16": (
        Regression,
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "precision": "16-mixed"},
    ),
    "value bf16": (
        Regression,
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "precision": "bf16-mixed"},
    ),
    "value accumulated": (
        Regression,
        {
            "gradient_clip_val": 0.1,
            "gradient_clip_algorithm": "value",
            "accumulate_grad_batches": 2,
        },
    ),
    "own value": (clipping(lambda p: clip_grad_value_(p, 0.1)), {}),
    "own value, foreach": (clipping(lambda p: clip_grad_value_(p, 0.1, foreach=True)), {}),
    "own value, one by one": (clipping(lambda p: clip_grad_value_(p, 0.1, foreach=False)), {}),
    "own norm": (clipping(lambda p: clip_grad_norm_(p, 1.0, foreach=True)), {}),
    "own norm, one by one": (clipping(lambda p: clip_grad_norm_(p, 1.0, foreach=False)), {}),
    "own norm, strict": (clipping(lambda p: clip_grad_norm_(p, 1.0, error_if_nonfinite=True)), {}),
    "largest norm": (clipping(lambda p: clip_grad_norm_(p, 1.0, norm_type=float("inf"))), {}),
    "reads gradients": (ReadsGradients, {}),
    "reads gradients, fp16": (ReadsGradients, {"precision": "16-mixed"}),
    "adds noise": (AddsNoise, {}),
    "lbfgs": (Lbfgs, {}),
    "by hand": (ReadsByHand, {}),
    "fused": (Fused, {}),
    "own optimizer_step": (OwnStep, {}),
    "sparse": (Sparse, {}),
}


def options_of(case):
    """On a CPU, fp16 needs a plugin, whose scaler no other fit may have used."""
    half = fp16(2.0**10) if case.get("precision") == "16-mixed" else {}
    return half | {k: v for k, v in case.items() if not half or k != "precision"}


def nan(module):
    """In manual optimization ``training_step`` returns the loss after the step."""
    return CorruptGradient(step=20) if module is ReadsByHand else NanLoss(step=20)


def spike(module):
    return ScaleGradients(step=20, factor=1e5)


CLIPPED_AWAY = {("norm", spike), ("norm fp16", spike)}
"""Where the Trainer clips to a norm, a large gradient is no reason to skip a step."""
SKIPPED = [
    pytest.param(*case, fault, id=f"{name}-{fault.__name__}")
    for name, case in CASES.items()
    for fault in (nan, spike)
    if (name, fault) not in CLIPPED_AWAY
]


@pytest.mark.each_value
@pytest.mark.parametrize(("module", "options", "fault"), SKIPPED)
def test_skipped_step_with_later_hooks_is_as_if_the_fault_had_never_been(
    module, options, fault, tmp_path
):
    suite = stability_callbacks()
    callbacks = [FaultInjector([fault(module)]), *suite]
    steps = {"max_steps": 45}
    saved, _ = fit(tmp_path / "suite", callbacks, module, **steps, **options_of(options))
    bare, _ = fit(tmp_path / "bare", (), module, **steps, **options_of(options))
    assert [i.outcome for i in suite[0].incidents] == ["recovered"]
    assert torch.equal(flat(saved), flat(bare))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_skipped_step_of_a_compiled_optimizer_is_as_if_the_fault_had_never_been(tmp_path):
    suite, steps = [GradientMonitor(), AutoRollback()], {"max_steps": 6}
    injector = FaultInjector([NanLoss(step=3)])
    saved, _ = fit(tmp_path / "suite", [injector, *suite], CompiledStep, **steps)
    bare, _ = fit(tmp_path / "bare", (), CompiledStep, **steps)
    assert [i.responses for i in suite[0].incidents] == [["step retried"]]
    assert torch.equal(flat(saved), flat(bare))


def test_hook_after_a_skipped_step_sees_gradients_of_zero(tmp_path):
    suite = [GradientMonitor(), AutoRollback()]
    module, _ = fit(tmp_path, [FaultInjector([NanLoss(step=20)]), *suite], ReadsGradients)
    zero = [i for i, norms in enumerate(module.seen) if not norms.any()]
    assert zero == [20], "the attempt that was retried, and no other"
    assert all(norms.isfinite().all() for norms in module.seen)


@pytest.mark.parametrize("clip", [{}, CASES["value"][1]], ids=["plain", "value"])
def test_responder_of_the_user_that_removes_gradients_skips_the_step_under_any_clipping(
    clip, tmp_path
):
    class Skips(StabilityCallback):
        def on_incident(self, trainer, pl_module, incident):
            self.before = flat(pl_module)
            for parameter in pl_module.parameters():
                parameter.grad = None
            incident.resolve(SkipStep())

    class Compares(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 20:
                weights = len(torch.cat([p.flatten() for p in pl_module.parameters()]))
                self.equal = torch.equal(flat(pl_module)[:weights], skips.before[:weights])

    skips, compares = Skips(), Compares()
    clips = AdaptiveGradientClipping(rule=FixedClip(norm=1e-3))
    callbacks = [FaultInjector([NanLoss(step=20)]), GradientMonitor(), skips, clips, compares]
    _, trainer = fit(tmp_path, callbacks, **clip)
    assert compares.equal, "no weight, by no part of the step, AdamW's decay included"
    assert clips.taken == 59
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {59}


def test_optimizer_after_a_fit_has_no_hook_of_the_suite(tmp_path):
    _, trainer = fit(tmp_path, stability_callbacks(), max_steps=3)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
