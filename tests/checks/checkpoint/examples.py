"""What the tests of the doctor share: checkpoints of tiny fits, and what is found in them."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lit_stability import stability_callbacks
from lit_stability.checks.checkpoint import examine
from lit_stability.faults import FaultInjector
from tests.conftest import fit


class Mixed(LightningModule):
    """Embedding with padding, BatchNorm, LayerNorm, a tied pair, a frozen layer, a mask of -inf."""

    def __init__(self, optimizer="adamw"):
        super().__init__()
        self.embedding = nn.Embedding(10, 8, padding_idx=0)
        self.body = nn.Sequential(
            *(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.zeros(4, 4).masked_fill(torch.eye(4) > 0, -torch.inf))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        tokens = (x[:, :1].abs() * 5).long().clamp(max=9).squeeze(1)
        h = self.body(torch.cat([x, self.embedding(tokens)], 1))
        logits = self.head(self.norm(h + self.frozen(h)))
        return F.cross_entropy(logits, (y.abs() * 3).long().clamp(max=9))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        kinds = {
            "adamw": lambda: torch.optim.AdamW(groups, 1e-2),
            "sgd": lambda: torch.optim.SGD(groups, 1e-2, momentum=0.9),
            "named": lambda: torch.optim.Adam(
                [(n, p) for n, p in self.named_parameters() if p.requires_grad], 1e-2
            ),
        }
        return kinds[self.optimizer]()


def checkpoint_of(folder, module=Mixed, steps=40, fault=None, **options):
    """The file of a fit under the whole suite, undisturbed or not."""
    faults = [] if fault is None else [FaultInjector([fault])]
    callbacks = [*faults, *stability_callbacks()]
    _, trainer = fit(folder, callbacks, module, max_steps=steps, **options)
    path = folder / "saved.ckpt"
    trainer.save_checkpoint(path)
    return path


def read(path):
    """The file, loaded."""
    return torch.load(path, weights_only=True)


def found(checkpoint, *severities):
    """Severity, name and first place of each finding, of some severities or of all."""
    return [
        (each.severity, each.what, each.where[0])
        for each in examine(checkpoint).findings
        if not severities or each.severity in severities
    ]
