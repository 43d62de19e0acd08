"""Small networks on synthetic data with irreducible noise.

The noise keeps the final loss well above zero, so that a ratio of two losses is meaningful.
Imports Lightning. Shape suffixes: B batch, C channels, S side length, T time, D features.
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
        net: The network.
        loss: Function of outputs, cast to float32, and targets.
        optimizer: Creates the optimizer from the trainable parameters.
        schedule: Creates a scheduler from the optimizer; stepped every step.
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
        """Returns the loss of a batch."""
        x, y = batch
        return self.loss(self.net(x).float(), y)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and, if there is one, its scheduler."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Cnn(nn.Module):
    """Two convolutions with BatchNorm, a mean over the image, one linear layer.

    Args:
        rms: Whether to divide the first convolution's output by its root mean square over the
            channels, in its own dtype. The network then does not depend on the scale of the
            images, but values above 256 overflow when squared in fp16.
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
        """Returns the logits of four classes."""
        x_BCSS = self.first(x_BCSS)
        if self.rms:
            x_BCSS = x_BCSS / ((x_BCSS * x_BCSS).mean(1, keepdim=True) + 1e-5).sqrt()
        logits: Tensor = self.head(self.features(x_BCSS).mean((2, 3)))
        return logits


class Recurrent(nn.Module):
    """A GRU with 32 units and a linear layer at each time step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns one value per time step."""
        values: Tensor = self.head(self.gru(x_BTD)[0]).squeeze(-1)
        return values


class Gan(LightningModule):
    """GAN that learns a normal distribution, with two optimizers in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
        self.critic = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Steps critic and generator, with the non-saturating loss (arXiv 1406.2661)."""
        (real_BD,) = batch
        generator_optimizer, critic_optimizer = self.optimizers()
        fake_BD = self.generator(torch.randn(len(real_BD), 2))
        logits = self.critic(torch.cat([real_BD, fake_BD.detach()]))
        labels = torch.cat([torch.ones_like(real_BD), torch.zeros_like(real_BD)])
        self._step(critic_optimizer, F.binary_cross_entropy_with_logits(logits, labels))
        loss = F.softplus(-self.critic(fake_BD)).mean()
        self._step(generator_optimizer, loss)
        return loss.detach()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns one Adam per network."""
        nets = (self.generator, self.critic)
        return [torch.optim.Adam(n.parameters(), 1e-3, (0.5, 0.9)) for n in nets]


def images(seed: int, n: int = 1024) -> TensorDataset:
    """Returns images of four 8 x 8 patterns, with noise of three times their deviation."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=g)
    return TensorDataset(patterns[y] + 3.0 * torch.randn(n, 1, 8, 8, generator=g), y)


def sequences(seed: int, n: int = 1024, length: int = 16) -> TensorDataset:
    """Returns sequences: a running mean of one input times the sign of another, plus noise 0.3."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, length, 4, generator=g)
    clean = (x[..., 0].cumsum(1) / torch.arange(1, length + 1).sqrt()) * x[..., 1].sign()
    return TensorDataset(x, clean + 0.3 * torch.randn(n, length, generator=g))


def normal(seed: int, n: int = 2048) -> TensorDataset:
    """Returns samples of a normal distribution with mean 3 and standard deviation 0.5."""
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(3 + 0.5 * torch.randn(n, 1, generator=g))


def batches(data: TensorDataset, seed: int, batch: int = 16) -> DataLoader[Any]:
    """Returns a DataLoader that shuffles with its own generator."""
    g = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch, shuffle=True, generator=g, drop_last=True)
