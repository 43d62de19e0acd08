"""`PerTensorClip` in real fits: each tensor by itself, and exact under rollback."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_stability import AdaptiveGradientClipping, AutoRollback, GradientMonitor
from lit_stability.faults import FaultInjector, ScaleGradients
from lit_stability.policies.clip_rules import FixedClip, PerTensorClip
from lit_stability.training_state.gradient_clipping import clip_step
from tests.clip_cases import suite
from tests.conftest import fit, make_trainer
from tests.exact import Batches, differences, loader, run
from tests.exact_net import Net

RULE = PerTensorClip(known_after=10, until_known=math.inf)


class TensorNorms(Callback):
    """Measured norms of the tensors, and those that reach the optimizer."""

    def __init__(self):
        self.measured, self.clipped = [], []

    def on_step_measured(self, trainer, pl_module, stats):
        self.measured.append(dict(zip(stats.names, stats.grad_norms, strict=True)))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.clipped.append({n: float(p.grad.norm()) for n, p in pl_module.named_parameters()})


def test_held_spike_in_one_tensor_is_clipped_and_no_other_tensor_is(tmp_path):
    norms, name = TensorNorms(), "net.0.weight"
    fault = FaultInjector([ScaleGradients(step=30, steps=5, factor=1e6, parameter=name)])
    # Others are never near their limit.
    callbacks = [fault, *suite(PerTensorClip(known_after=10, ratio=100.0, until_known=1e9), norms)]
    fit(tmp_path, callbacks, max_steps=40)
    state = callbacks[2].state_dict()["0"]["state"]
    for measured, clipped in zip(norms.measured[30:35], norms.clipped[30:35], strict=True):
        assert measured[name] > 50 * clipped[name]
        assert clipped[name] <= 100 * state["norms"][name]
        others = {n: norm for n, norm in measured.items() if n != name}
        assert {n: clipped[n] for n in others} == pytest.approx(others)
    assert callbacks[2].clipped >= 5


@pytest.mark.parametrize("late", [False, True])
def test_rollback_restores_what_was_learnt(late, tmp_path):
    """Invariant 7: a bad batch that is skipped, and a weight that is damaged and found later."""

    class Struck(Net):
        struck = not late

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 15 and not type(self).struck:
                type(self).struck = True
                with torch.no_grad():
                    self.first[0].weight[0, 0] = float("nan")

    bad, results, states = () if late else (16,), [], []
    for name, data in {"bad": {"nan": bad}, "clean": {"left_out": bad}}.items():
        callbacks = suite(RULE, AutoRollback())
        results.append(
            run(tmp_path / name, Struck, loader(Batches(**data)), callbacks, max_epochs=1)
        )
        assert len(callbacks[0].incidents) == (name == "bad")
        states.append(callbacks[1].state_dict())
    assert differences(*results) == {}
    assert states[0] == states[1]


def test_run_that_is_resumed_has_the_limits_of_the_one_before(tmp_path):
    _, trainer = fit(tmp_path, first := suite(RULE), max_steps=20)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    second = suite(RULE)
    resumed = make_trainer(tmp_path, second, max_steps=20)
    module = type(trainer.lightning_module)()
    resumed.fit(module, trainer.train_dataloader, ckpt_path=tmp_path / "saved.ckpt")
    assert second[1].state_dict() == first[1].state_dict()


class ClipsToo(Callback):
    """Another callback that clips the same step, before the rule or after it."""

    def __init__(self, norm, hook):
        self.norm, self.left = norm, []
        setattr(self, hook, self._clip)

    def on_step_measured(self, trainer, pl_module, stats):
        self.stats = stats

    def _clip(self, trainer, pl_module, optimizer_or_stats):
        (optimizer,) = trainer.optimizers
        clip_step(optimizer, self.stats, self.norm)


class Left(Callback):
    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad.flatten() for p in pl_module.parameters()]
        self.norms.append(float(torch.cat(grads).norm()))


@pytest.mark.parametrize("hook", ["on_healthy_step", "on_before_optimizer_step"])
def test_step_that_another_callback_clips_as_well_has_the_smaller_norm(hook, tmp_path):
    """None is applied on top of what has been clipped already."""
    left, other = Left(), ClipsToo(0.5, hook)
    fit(tmp_path, [GradientMonitor(), AdaptiveGradientClipping(rule=RULE), other, left])
    alone = Left()
    fit(tmp_path, [*suite(FixedClip(norm=0.5)), alone])
    assert max(left.norms) <= 0.5 * (1 + 1e-4)
    assert max(left.norms[:10]) == pytest.approx(max(alone.norms[:10]), rel=1e-3)
