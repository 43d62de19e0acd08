"""A small net for the comparison of whole runs, with the optimizers and schedulers to try."""

import torch
import torchmetrics
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "foreach amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.01, max_iter=3),
    "tensor LR": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2), foreach=False),
}


def onecycle(optimizer):
    schedule = lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=200)
    return {"scheduler": schedule, "interval": "step"}


def cosine_by_epoch(optimizer):
    return {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 3), "interval": "epoch"}


def plateau(monitor, interval):
    def make(optimizer):
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        return {"scheduler": schedule, "interval": interval, "monitor": monitor}

    return make


class Net(LightningModule):
    """Dropout and BatchNorm on a regression task."""

    def __init__(self, optimizer="AdamW", scheduler=None, recompute=False, compiled=False):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.last = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 1))
        self.error = torchmetrics.MeanAbsoluteError()
        self.optimizer, self.scheduler = OPTIMIZERS[optimizer], scheduler
        self.recompute = recompute
        if compiled:
            self.first.compile(backend="eager")

    def forward(self, x):
        if self.recompute:
            return self.last(checkpoint(self.first, x, use_reentrant=False)).squeeze(-1)
        return self.last(self.first(x)).squeeze(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch["a"] if isinstance(batch, dict) else batch
        guess = self(x)
        loss = nn.functional.mse_loss(guess, y)
        self.error(guess.float(), y.float())
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(y))
        self.log("train/error", self.error, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}
