"""Rules that are busy on small nets, what to look at them with, and what the ranks run."""

import copy
import warnings

import torch
from lightning.pytorch.callbacks import Callback

from lit_stability import AdaptiveGradientClipping, AutoRollback, GradientMonitor
from lit_stability.faults import CorruptWeight, FaultInjector
from lit_stability.policies.clip_rules import (
    FixedClip,
    MeanSigmaClip,
    PercentileClip,
    PerTensorClip,
    TieredClip,
    ZScoreClip,
)
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from tests.rank_cases import fit_rank, whole

# A threshold amid the norms of the small nets, so that about every other step is clipped.
BUSY = {
    "fixed": FixedClip(norm=1.5),
    "tiered": TieredClip(tiers=((3.0, 2.0, 0.5), (2.0, 1.5, 1.0)), otherwise=0.8, lr_steps=3),
    "percentile": PercentileClip(percentile=50, window=20, bounds=(0.1, 9.0), known_after=5),
    "mean and sigma": MeanSigmaClip(sigmas=0.1, window=20, known_after=5),
    "z-score": ZScoreClip(z_max=0.1, known_after=5),
}


class Norms(Callback):
    """Norms that were measured, those that reach the optimizer, and its learning-rate factor."""

    def __init__(self):
        self.measured, self.clipped, self.factors, self.batches = [], [], [], 0

    def on_train_batch_start(self, *args):
        self.batches += 1

    def on_step_measured(self, trainer, pl_module, stats):
        self.measured.append(stats.grad_norm)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        skipped = any(grad is None for grad in grads)
        flat = [torch.zeros(1)] if skipped else [grad.flatten() for grad in grads]
        self.clipped.append(float(torch.cat(flat).double().norm()))
        self.factors.append(min(learning_rate_multiplier(optimizer).factors, default=1.0))


def suite(rule, *others):
    return [GradientMonitor(), AdaptiveGradientClipping(rule=rule), *others]


def expected(rule, norms):
    """What each norm is clipped to by a rule that learns them all."""
    rule, clipped = copy.deepcopy(rule), []
    for norm in norms:
        clipped.append(min(norm, rule.threshold(norm)))
        rule.update(norm)
    return clipped


RULE = TieredClip(tiers=((1.5, 0.5, 0.5),), otherwise=0.25, lr_steps=3)

PER_TENSOR = PerTensorClip(known_after=5, until_known=0.5)


class WholeNorms(Callback):
    """Measured and clipped norm of the whole gradient; to stand behind the suite."""

    def __init__(self):
        self.measured, self.clipped = [], []

    def on_step_measured(self, trainer, pl_module, stats):
        self.measured.append(stats.grad_norm)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        skipped = any(grad is None for grad in grads)
        self.clipped.append(0.0 if skipped else float(whole(grads).norm()))


def clipped_fits(root, name):
    """What a rank tells of a clean fit and one that is rolled back, under each strategy."""
    warnings.simplefilter("ignore")
    found = {
        (strategy, case): _fit(root / f"{strategy}-{case}", strategy, clean=case == "clean")
        for strategy in ("ddp", "fsdp2")
        for case in ("clean", "rolled back")
    }
    found["fsdp2", "per tensor"] = _fit(root / "tensors", "fsdp2", clean=True, rule=PER_TENSOR)
    return found


def _fit(root, strategy, *, clean, rule=RULE):
    monitor, clipping, norms = GradientMonitor(), AdaptiveGradientClipping(rule=rule), WholeNorms()
    fault = CorruptWeight(step=25, rank=1, parameter="net.0.weight")
    faults = [] if clean else [FaultInjector([fault])]
    suite = [*faults, monitor, clipping, AutoRollback(), norms]
    net, _ = fit_rank(root, strategy, suite, max_steps=35)
    return {
        "weights": whole(net.parameters()),
        "state": clipping.state_dict(),
        "measured": norms.measured,
        "clipped": norms.clipped,
        "incidents": len(monitor.incidents),
    }
