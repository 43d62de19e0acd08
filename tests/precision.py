"""A regression, its data and its fits, for the tests of precision."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_stability import (
    AutoRollback,
    GradientMonitor,
    PrecisionFallback,
)
from tests.conftest import fit


class Net(LightningModule):
    """A regression with dropout; its loss may be computed in the format of its outputs."""

    def __init__(self, lr=1e-2, eps=1e-8, own_loss=False, norm=True):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 32),
            nn.LayerNorm(32) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(32, 1),
        )
        self.lr, self.eps, self.own_loss, self.losses = lr, eps, own_loss, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x).squeeze(-1)
        if self.own_loss:
            loss = (out - y.to(out.dtype)).pow(2).mean()
        else:
            loss = nn.functional.mse_loss(out.float(), y.float())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, eps=self.eps)


def data(inputs=1.0, targets=1.0, poison=None, batches=100):
    """Batches of a linear task; `poison` is the index of a batch and a factor of its inputs."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batches * 16, 8, generator=g)
    y = x @ torch.arange(8.0) / 8 + 0.1 * torch.randn(batches * 16, generator=g)
    x = x * inputs
    if poison is not None:
        index, factor = poison
        x[index * 16 : index * 16 + 16] *= factor
    return DataLoader(TensorDataset(x, y * targets), 16)


def fp16(init_scale=2.0**16):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=50)
    return {"plugins": MixedPrecision("16-mixed", device="cpu", scaler=scaler)}


def suite(**options):
    return [GradientMonitor(), PrecisionFallback(**options), AutoRollback()]


def train(root, callbacks, loader, steps=100, **options):
    module = options.pop("module", Net)
    return fit(root, callbacks, module, loader, max_steps=steps, **options)


def evaluate(module, loader):
    """Loss in float32, without dropout."""
    module = module.float().eval()
    with torch.no_grad():
        errors = [(module.net(x).squeeze(-1) - y).pow(2).mean() for x, y in loader]
    return float(sum(errors) / len(errors))
