"""Unstable runs, each with a twin that differs in one option and trains.

No fault is injected: the cause is a learning rate, a missing warm-up, an optimizer constant or a
gain of zero. Every module records the loss of each step in ``losses``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader


class Regression(LightningModule):
    """Trains a small net with the squared error.

    Args:
        net: Network for inputs of shape ``(batch, features)``.
        optimizer: Creates the optimizer from the parameters.
    """

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the mean squared error."""
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return self.optimizer(self.parameters())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run with its correct diagnosis."""

    name: str
    steps: int
    module: Callable[[], LightningModule]
    """Creates the module after the seed was set."""
    data: Callable[[int], DataLoader[Any]]
    """Creates the data from the seed."""
    cause: str | None
    """Name of the correct cause in `lit_stability.diagnosis`; None for a healthy run."""
    twin: Callable[[], LightningModule] | None = None
    """Creates the healthy module, for the same data and number of steps."""

    def healthy(self) -> Case:
        """Returns the twin as a case.

        Raises:
            ValueError: The case has no twin.
        """
        if self.twin is None:
            raise ValueError(f"{self.name!r} has no twin")
        return replace(self, name=f"{self.name}, twin", module=self.twin, cause=None, twin=None)


def mlp(lr: float) -> LightningModule:
    """Creates a ReLU MLP (32 inputs, hidden layers of 128, 1 output); SGD with momentum 0.9."""
    sizes = [32, 128, 128, 128]
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(128, 1))
    return Regression(net, lambda p: torch.optim.SGD(p, lr, momentum=0.9))


def linear_teacher(seed: int, batch: int = 128) -> DataLoader[Any]:
    """Returns 32 Gaussian inputs of deviation 0.8 and a linear target with weights N(0, 1/32)."""
    g = torch.Generator().manual_seed(seed)
    x = 0.8 * torch.randn(16384, 32, generator=g)
    y = x @ torch.randn(32, 1, generator=g) / math.sqrt(32)
    return DataLoader(TensorDataset(x, y), batch, shuffle=True, generator=g)


def full_batch_mlp(lr: float) -> LightningModule:
    """Creates an MLP with two tanh layers of 32, trained by plain gradient descent."""
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return Regression(net, lambda p: torch.optim.SGD(p, lr))


def full_batch(seed: int) -> DataLoader[Any]:
    """Returns one batch of 64 samples."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=g)
    y = torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    return DataLoader(TensorDataset(x, y), 64)


def sine_mlp(beta2: float) -> LightningModule:
    """Creates a 1-20-20-1 tanh MLP with Adam at 0.02 (after arXiv 2506.04805)."""
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    return Regression(net, lambda p: torch.optim.Adam(p, 0.02, (0.9, beta2)))


def sines(seed: int) -> DataLoader[Any]:
    """Returns one batch: sin x + sin 4x at 200 points of [-pi, pi]."""
    x = torch.linspace(-math.pi, math.pi, 200)[:, None]
    return DataLoader(TensorDataset(x, torch.sin(x) + torch.sin(4 * x)), 200)


def byte_gpt(**options: Any) -> LightningModule:
    """Creates a byte GPT with 185k weights: 3 pre-norm layers of width 64, 100 warm-up steps."""
    return ByteGPTModule(ByteGPTConfig(width=64, layers=3), **({"warmup": 100} | options))


def post_norm_gpt(warmup: int) -> LightningModule:
    """Creates a byte GPT with 6 post-norm layers, learning rate 3e-3, betas (0.9, 0.999)."""
    config = ByteGPTConfig(width=64, layers=6, post_norm=True)
    return ByteGPTModule(config, lr=3e-3, warmup=warmup, betas=(0.9, 0.999))


def zeroed_final_gain() -> LightningModule:
    """Creates a byte GPT whose last norm has a frozen gain of 0."""
    module = byte_gpt()
    assert isinstance(module, ByteGPTModule)
    nn.init.zeros_(module.model.norm.weight)
    module.model.norm.weight.requires_grad_(False)
    return module


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="learning rate diverges",
            steps=200,
            module=lambda: mlp(0.5),
            twin=lambda: mlp(0.05),
            data=linear_teacher,
            cause="learning rate too high",
        ),
        Case(
            name="edge of stability",
            steps=2000,
            module=lambda: full_batch_mlp(0.2),
            data=full_batch,
            cause=None,
        ),
        Case(
            name="attention logits grow",
            steps=400,
            module=lambda: byte_gpt(lr=0.1),
            twin=lambda: byte_gpt(lr=1e-3),
            data=lambda seed: loader(seed=seed),
            cause="attention-logit growth",
        ),
        Case(
            name="post-norm without warm-up",
            steps=500,
            module=lambda: post_norm_gpt(1),
            twin=lambda: post_norm_gpt(100),
            data=lambda seed: loader(batch=8, seed=seed),
            cause="no warm-up",
        ),
        Case(
            name="Adam's beta2 makes spikes",
            steps=3000,
            module=lambda: sine_mlp(0.99),
            twin=lambda: sine_mlp(0.9),
            data=sines,
            cause="stale second moment",
        ),
        Case(
            name="final gain zeroed",
            steps=300,
            module=zeroed_final_gain,
            twin=byte_gpt,
            data=lambda seed: loader(seed=seed),
            cause="zeroed gain",
        ),
    )
}
