"""Runs that go wrong by themselves, each beside a twin that differs in one thing and trains.

Nothing is injected here: the fault is a learning rate, a missing warm-up, an optimizer constant, a
gain of zero. Every module keeps the loss of each step in ``losses``.
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
    """Squared error of a small net.

    Args:
        net: inputs of shape ``(batch, features)``.
        optimizer: given the parameters.
    """

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As given."""
        return self.optimizer(self.parameters())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    name: str
    steps: int
    module: Callable[[], LightningModule]
    """Made after the seed was set."""
    data: Callable[[int], DataLoader[Any]]
    """Given the seed."""
    cause: str | None
    """The row of `lit_stability.diagnosis` to be named; None for a healthy run."""
    twin: Callable[[], LightningModule] | None = None
    """The healthy module, on the same data for as many steps."""

    def healthy(self) -> Case:
        """The twin as a case of its own.

        Raises:
            ValueError: if the case is healthy itself.
        """
        if self.twin is None:
            raise ValueError(f"{self.name!r} has no twin")
        return replace(self, name=f"{self.name}, twin", module=self.twin, cause=None, twin=None)


def mlp(lr: float) -> LightningModule:
    """32 inputs, three hidden layers of 128 with ReLU, one output; SGD with momentum 0.9."""
    sizes = [32, 128, 128, 128]
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(128, 1))
    return Regression(net, lambda p: torch.optim.SGD(p, lr, momentum=0.9))


def linear_teacher(seed: int, batch: int = 128) -> DataLoader[Any]:
    """Gaussian inputs of 32 features, deviation 0.8; the target is a unit linear form of them."""
    g = torch.Generator().manual_seed(seed)
    x = 0.8 * torch.randn(16384, 32, generator=g)
    y = x @ torch.randn(32, 1, generator=g) / math.sqrt(32)
    return DataLoader(TensorDataset(x, y), batch, shuffle=True, generator=g)


def full_batch_mlp(lr: float) -> LightningModule:
    """Two tanh layers of 32 on full batches, plain gradient descent."""
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return Regression(net, lambda p: torch.optim.SGD(p, lr))


def full_batch(seed: int) -> DataLoader[Any]:
    """One batch of 64 samples, over and over."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=g)
    y = torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    return DataLoader(TensorDataset(x, y), 64)


def sine_mlp(beta2: float) -> LightningModule:
    """1-20-20-1 with tanh, full-batch Adam at 0.02 (after arXiv 2506.04805)."""
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    return Regression(net, lambda p: torch.optim.Adam(p, 0.02, (0.9, beta2)))


def sines(seed: int) -> DataLoader[Any]:
    """The function sin x + sin 4x at 200 points of [-pi, pi], one batch."""
    x = torch.linspace(-math.pi, math.pi, 200)[:, None]
    return DataLoader(TensorDataset(x, torch.sin(x) + torch.sin(4 * x)), 200)


def byte_gpt(**options: Any) -> LightningModule:
    """Width 64, 3 pre-norm layers, 64 tokens, 100 steps of warm-up, 185k parameters."""
    return ByteGPTModule(ByteGPTConfig(width=64, layers=3), **({"warmup": 100} | options))


def post_norm_gpt(warmup: int) -> LightningModule:
    """6 post-norm layers, learning rate 3e-3, betas (0.9, 0.999)."""
    config = ByteGPTConfig(width=64, layers=6, post_norm=True)
    return ByteGPTModule(config, lr=3e-3, warmup=warmup, betas=(0.9, 0.999))


def zeroed_final_gain() -> LightningModule:
    """The byte GPT with the gain of its last norm at 0, and frozen there."""
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
