"""What the ranks run for the tests of adaptive clipping: a clip that is reached all the time."""

import warnings

from lightning.pytorch.callbacks import Callback

from lit_stability import AdaptiveGradientClipping, AutoRollback, GradientMonitor
from lit_stability.clip_rules import TieredClip
from lit_stability.faults import CorruptWeight, FaultInjector
from tests.rank_cases import fit_rank, whole

RULE = TieredClip(tiers=((1.5, 0.5, 0.5),), otherwise=0.25, lr_steps=3)


class Norms(Callback):
    """Measured and clipped norm of the whole gradient; to stand behind the suite."""

    def __init__(self):
        self.measured, self.clipped = [], []

    def on_step_measured(self, trainer, pl_module, stats):
        self.measured.append(stats.grad_norm)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        vetoed = any(grad is None for grad in grads)
        self.clipped.append(0.0 if vetoed else float(whole(grads).norm()))


def clipped_fits(root, name):
    """What a rank tells of a clean fit and one that is rolled back, under each strategy."""
    warnings.simplefilter("ignore")
    return {
        (strategy, case): _fit(root / f"{strategy}-{case}", strategy, clean=case == "clean")
        for strategy in ("ddp", "fsdp2")
        for case in ("clean", "rolled back")
    }


def _fit(root, strategy, *, clean):
    monitor, clipping, norms = GradientMonitor(), AdaptiveGradientClipping(rule=RULE), Norms()
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
