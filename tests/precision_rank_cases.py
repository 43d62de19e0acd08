"""What the ranks run for tests/test_precision_ranks.py: fits that die of their precision."""

import warnings

import torch
from torch import nn

from lit_stability import AutoRollback, GradientMonitor, PrecisionFallback
from lit_stability.training_state.fp32_modules import fp32_modules_of
from tests.rank_cases import Net, fit_rank, incidents_of, whole


class OutOfRange(Net):
    """Inputs that overflow in fp16, on rank 1 alone, and a norm that makes them ordinary."""

    def __init__(self, sharded, dropout=0.1):
        super().__init__(sharded, dropout)
        self.net[1] = nn.LayerNorm(31)

    def loss(self, batch):
        x, y = batch
        x = x * 1e5 if self.trainer.global_rank == 1 else x
        return nn.functional.mse_loss(self.net(x).squeeze(-1).float(), y)


class Rounded(Net):
    """A probability of 0.998, which is 1 in bfloat16, and the logarithm of its rest; on rank 1."""

    def loss(self, batch):
        x, y = batch
        shift = 6.0 if self.trainer.global_rank == 1 else 0.0
        rest = 1 - torch.sigmoid(self.net(x).squeeze(-1) + shift)
        return -torch.log(rest).float().mean() + 0.0 * y.mean()


class Slow(Net):
    """Updates too small for bfloat16 weights."""

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x).squeeze(-1).float(), y.float())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-4)


def fallen(root, name, module, options):
    """What a rank tells of a fit that falls back."""
    warnings.simplefilter("ignore")
    fallback = PrecisionFallback(max_fp32_modules=options.pop("max_fp32_modules", 0))
    suite = [GradientMonitor(), fallback, AutoRollback()]
    net, trainer = fit_rank(root, name, suite, module=module, **options)
    return {
        "incidents": incidents_of(suite),
        "evidence": [i.evidence for i in suite[0].incidents],
        "precision": trainer.precision,
        "weights": whole(net.parameters()),
        "islands": fp32_modules_of(net),
        "formats": {str(p.dtype) for p in net.parameters()},
        "losses": net.losses,
    }


CASES = {
    "ddp fp16": ("ddp", OutOfRange, {"fp16": True}),
    "ddp island": ("ddp", OutOfRange, {"fp16": True, "max_fp32_modules": 3}),
    "ddp begun in bf16": ("ddp", OutOfRange, {"precision": "bf16-mixed"}),
    "ddp bf16 weights": ("ddp", Slow, {"precision": "bf16-true", "max_steps": 170}),
    "fsdp2 bf16": ("fsdp2", Rounded, {"precision": "bf16-mixed"}),
    "fsdp2 begun in fp32": ("fsdp2", Rounded, {}),
}


def all_cases(root, name):
    """Every case of a strategy, one after the other."""
    return {
        label: fallen(root / label.replace(" ", "-"), strategy, module, dict(options))
        for label, (strategy, module, options) in CASES.items()
        if strategy == name
    }
