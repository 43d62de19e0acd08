"""Building blocks of the runs: modules, data, optimizers and schedules.

Some runs diverge, others only look like it. The runs of a family differ in width, learning rate,
optimizer constants and the step of the change, all drawn from the seed. No fault is injected: the
cause is a learning rate, a schedule, an initialisation, a feedback of the target, or fp16 range.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader

Schedule = Callable[[int], float]
"""Factor on the learning rate as a function of the step."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run before training."""

    module: LightningModule
    data: Any
    """Data for ``Trainer.fit``: a DataLoader, or a list of batches."""
    steps: int = 300
    fp16: bool = False


class Net(LightningModule):
    """Trains a small net with the squared error.

    Args:
        net: Network for inputs of shape ``(batch, features)``.
        optimizer: Creates the optimizer from the parameters.
        schedule: Factor on the learning rate.
        feedback: Weight, as a function of the step, of the net's own output at inputs 10 % larger
            in the targets; from about 1 on, the targets grow without bound.
        momentum: Momentum of the optimizer as a function of the step, if it changes; above 1 the
            oscillations grow.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        schedule: Schedule = lambda step: 1.0,
        feedback: Schedule = lambda step: 0.0,
        momentum: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.schedule, self.feedback, self.momentum = schedule, feedback, momentum

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean squared error."""
        x, y = batch
        weight = self.feedback(self.global_step)
        if weight:
            with torch.no_grad():
                y = y + weight * self.net(1.1 * x)
        return F.mse_loss(self.net(x).float(), y.float())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the momentum of the step."""
        if self.momentum is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["momentum"] = self.momentum(self.global_step)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer with its scheduler."""
        optimizer = self.optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def mlp(width: int, depth: int = 2, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Creates an MLP with 16 inputs, hidden layers of equal width and one output."""
    layers: list[nn.Module] = []
    for i, o in pairwise([16, *[width] * depth]):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def he_normal(net: nn.Sequential) -> nn.Sequential:
    """Initialises weights with deviation ``sqrt(2 / fan_in)`` (He et al. 2015)."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net


def batches(
    seed: int, steps: int, *, batch: int = 64, noise: Schedule = lambda step: 0.3, scale: float = 1
) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of new samples of a fixed two-layer teacher, with noise on the targets."""
    g = torch.Generator().manual_seed(seed)
    inner, outer = torch.randn(16, 8, generator=g) / 4, torch.randn(8, 1, generator=g) / 2
    data = []
    for step in range(steps):
        x = torch.randn(batch, 16, generator=g)
        y = torch.tanh(x @ inner) @ outer + noise(step) * torch.randn(batch, 1, generator=g)
        data.append((x, scale * y))
    return data


def sgd(lr: float, momentum: float = 0.9) -> Callable[[Any], torch.optim.Optimizer]:
    """Returns a function that creates SGD."""
    return lambda p: torch.optim.SGD(p, lr, momentum=momentum)


def adam(lr: float, beta2: float = 0.999) -> Callable[[Any], torch.optim.Optimizer]:
    """Returns a function that creates Adam."""
    return lambda p: torch.optim.Adam(p, lr, (0.9, beta2))


def jump(at: int, factor: float) -> Schedule:
    """A learning rate that jumps by a factor, as with a wrong scheduler."""
    return lambda step: factor if step >= at else 1.0


def exponential(start: int, per_step: float) -> Schedule:
    """A learning rate that grows exponentially, up to a factor of e^20."""
    return lambda step: math.exp(min(per_step * max(0, step - start), 20.0))


def linear(start: int, per_step: float) -> Schedule:
    """A learning rate that grows linearly."""
    return lambda step: 1 + per_step * max(0, step - start)


def restarts(period: int) -> Schedule:
    """Cosine decay with warm restarts (Loshchilov & Hutter 2017)."""
    return lambda step: 0.02 + 0.49 * (1 + math.cos(math.pi * (step % period) / period))


def gpt(r: random.Random, seed: int, steps: int = 220, batch: int = 8, **options: Any) -> Run:
    """Creates a run of a byte GPT of width 64."""
    layers = options.pop("layers", r.choice((2, 3)))
    config = ByteGPTConfig(
        width=64, layers=layers, length=32, post_norm=options.pop("post_norm", False)
    )
    module = ByteGPTModule(config, **({"lr": r.choice((1e-3, 3e-3)), "warmup": 20} | options))
    return Run(module=module, data=loader(batch, 32, seed), steps=steps)
