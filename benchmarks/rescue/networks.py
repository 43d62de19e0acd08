"""Small networks on synthetic data, with noise that no network can learn away.

The noise keeps the last loss well above zero, so that a ratio of two losses means something.
May import Lightning. Shape suffixes: B batch, C channels, S side, T time, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Optimizer = Callable[[Any], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer], Any]


class Supervised(LightningModule):
    """Trains a network on pairs of inputs and targets.

    Args:
        net: inputs to outputs.
        loss: of outputs and targets; outputs are cast to float32 before.
        optimizer: given the parameters that train.
        schedule: given the optimizer, stepped with it.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Optimizer,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer, self.schedule = net, loss, optimizer, schedule

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return self.loss(self.net(x).float(), y)

    def configure_optimizers(self) -> Any:
        """As given."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Cnn(nn.Module):
    """Two convolutions with BatchNorm, a mean over the image, one linear layer.

    Args:
        rms: divide what the first convolution gives by its root mean square over the channels, in
            the format that it comes in: the network then does not depend on the scale of its
            images, but squares of more than 256 are infinite in fp16.
    """

    def __init__(self, *, rms: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.rms = rms
        self.features = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """Images to logits of four classes."""
        x_BCSS = self.first(x_BCSS)
        if self.rms:
            x_BCSS = x_BCSS / ((x_BCSS * x_BCSS).mean(1, keepdim=True) + 1e-5).sqrt()
        logits: Tensor = self.head(self.features(x_BCSS).mean((2, 3)))
        return logits


class Recurrent(nn.Module):
    """A GRU of 32 units and a linear layer at each time."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Sequences to one value for each time."""
        values: Tensor = self.head(self.gru(x_BTD)[0]).squeeze(-1)
        return values


class Gan(LightningModule):
    """Learns to draw from a normal distribution: two networks, two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
        self.critic = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """One step of each, with the loss that does not saturate (arXiv 1406.2661)."""
        (real_BD,) = batch
        draw, judge = self.optimizers()
        fake_BD = self.generator(torch.randn(len(real_BD), 2))
        found = self.critic(torch.cat([real_BD, fake_BD.detach()]))
        truth = torch.cat([torch.ones_like(real_BD), torch.zeros_like(real_BD)])
        self._step(judge, F.binary_cross_entropy_with_logits(found, truth))
        loss = F.softplus(-self.critic(fake_BD)).mean()
        self._step(draw, loss)
        return loss.detach()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for each."""
        nets = (self.generator, self.critic)
        return [torch.optim.Adam(n.parameters(), 1e-3, (0.5, 0.9)) for n in nets]


def images(seed: int, n: int = 1024) -> TensorDataset:
    """Four patterns of 8 x 8 under noise of three times their deviation, half as many batches."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=g)
    return TensorDataset(patterns[y] + 3.0 * torch.randn(n, 1, 8, 8, generator=g), y)


def sequences(seed: int, n: int = 1024, length: int = 16) -> TensorDataset:
    """A running mean of one input, gated by the sign of another, with noise of 0.3."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, length, 4, generator=g)
    clean = (x[..., 0].cumsum(1) / torch.arange(1, length + 1).sqrt()) * x[..., 1].sign()
    return TensorDataset(x, clean + 0.3 * torch.randn(n, length, generator=g))


def normal(seed: int, n: int = 2048) -> TensorDataset:
    """Draws of a normal distribution of mean 3 and deviation 0.5."""
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(3 + 0.5 * torch.randn(n, 1, generator=g))


def batches(data: TensorDataset, seed: int, batch: int = 16) -> DataLoader[Any]:
    """Shuffled by a generator of their own."""
    g = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch, shuffle=True, generator=g, drop_last=True)
