"""Kinds with a generator and a critic, which two optimizers train by manual optimization.

Imports Lightning and torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from benchmarks.healthy.kind import GRADIENTS, LOSSES, WRITES, Kind
from benchmarks.healthy.networks import Net, generator, loader, mlp


def points(seed: int) -> DataLoader[Any]:
    """Returns points of a normal distribution in the plane, away from the origin."""
    noise = torch.randn(1600, 2, generator=generator(seed))
    return loader(torch.tensor([2.0, -1.0]) + 0.5 * noise)


class Adversaries(Net):
    """A generator and a critic; judged by the distance of the means of real and made points.

    Args:
        loss: "wasserstein" or "logistic", for both networks.
        rate: Learning rate of both optimizers.
        clamp: Largest weight of the critic, if it is clamped.
        spectral: The critic's layers have a spectral norm.
        penalty: "real": slope at real points; "between": slope of 1 between real and made ones.
        factor: Of the penalty.
        every: Batches from one penalty to the next.
        start: First batch with the penalty.
        critic_steps: Steps of the critic for each of the generator.
    """

    def __init__(
        self,
        loss: Literal["wasserstein", "logistic"] = "logistic",
        rate: float = 1e-3,
        clamp: float | None = None,
        spectral: bool = False,
        penalty: Literal["real", "between"] | None = None,
        factor: float = 1.0,
        every: int = 1,
        start: int = 0,
        critic_steps: int = 1,
    ) -> None:
        nets = nn.ModuleDict({"generator": mlp(4, 2, 32), "critic": mlp(2, 1, 32)})
        super().__init__(net=nets)
        self.automatic_optimization = False
        self.kind, self.rate, self.clamp = loss, rate, clamp
        self.penalty, self.factor, self.every, self.start = penalty, factor, every, start
        self.critic_steps = critic_steps
        if spectral:
            for i in (0, 2, 4):
                parametrizations.spectral_norm(nets["critic"][i])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Steps the critic, then the generator when it is its turn."""
        generator_optimizer, critic_optimizer = self.optimizers()
        real, count = batch[0], self.trainer.fit_loop.total_batch_idx
        made = self.net["generator"](torch.randn(len(real), 4))
        self._step(critic_optimizer, self._critic_loss(real, made.detach(), count))
        self._clamp()
        if count % self.critic_steps == 0:
            self._step(generator_optimizer, self._generator_loss(made))
        self.track(made.mean(), (made.mean(0) - real.mean(0)).norm())

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def _critic_loss(self, real: Tensor, made: Tensor, count: int) -> Tensor:
        critic = self.net["critic"]
        loss = critic(made).mean() - critic(real).mean()
        if self.kind == "logistic":
            loss = F.softplus(critic(made)).mean() + F.softplus(-critic(real)).mean()
        if self.penalty and count >= self.start and count % self.every == 0:
            loss = loss + self.factor * self._penalty(real, made)
        return loss

    def _penalty(self, real: Tensor, made: Tensor) -> Tensor:
        share = torch.rand(len(real), 1) if self.penalty == "between" else 1.0
        at = (share * real + (1 - share) * made).requires_grad_()
        (slope,) = torch.autograd.grad(self.net["critic"](at).sum(), at, create_graph=True)
        if self.penalty == "between":
            return (slope.norm(dim=1) - 1).square().mean()
        return slope.square().sum(1).mean()

    def _generator_loss(self, made: Tensor) -> Tensor:
        score = self.net["critic"](made)
        return -score.mean() if self.kind == "wasserstein" else F.softplus(-score).mean()

    @torch.no_grad()
    def _clamp(self) -> None:
        if self.clamp is not None:
            for parameter in self.net["critic"].parameters():
                parameter.clamp_(-self.clamp, self.clamp)

    def configure_optimizers(self) -> Any:
        """Returns an optimizer for each network."""
        return [
            torch.optim.Adam(self.net[name].parameters(), self.rate, betas=(0.5, 0.9))
            for name in ("generator", "critic")
        ]


def kind(name: str, group: str, practice: str, **options: Any) -> Kind:
    steps = options.pop("steps", 400)
    module = partial(Adversaries, **options)
    return Kind(name=name, group=group, practice=practice, module=module, data=points, steps=steps)


KINDS = (
    kind(
        "GAN, critic clamped each step",
        WRITES,
        "A Wasserstein critic's weights are clamped to 0.1 after each of its steps.",
        loss="wasserstein",
        clamp=0.1,
    ),
    kind(
        "GAN, critic clamped, five critic steps",
        WRITES,
        "A critic whose weights are clamped to 0.2 steps five times as often as the generator.",
        loss="wasserstein",
        clamp=0.2,
        critic_steps=5,
        rate=2e-3,
    ),
    kind(
        "GAN, spectral norm",
        WRITES,
        "The layers of the critic have a spectral norm.",
        spectral=True,
        rate=2e-3,
    ),
    kind(
        "GAN, lazy slope penalty every 16th batch",
        GRADIENTS,
        "A penalty on the slope at real points, 16 times as large, enters every 16th batch.",
        penalty="real",
        factor=16.0,
        every=16,
    ),
    kind(
        "GAN, lazy slope penalty every 37th batch, x100",
        GRADIENTS,
        "A penalty on the slope at real points, 100 times as large, enters every 37th batch.",
        penalty="real",
        factor=100.0,
        every=37,
    ),
    kind(
        "GAN, gradient penalty from batch 100 on",
        GRADIENTS,
        "A Wasserstein critic's gradient penalty, with weight 10, begins at batch 100.",
        loss="wasserstein",
        penalty="between",
        factor=10.0,
        start=100,
        rate=5e-4,
    ),
    kind(
        "GAN, gradient penalty in every batch",
        GRADIENTS,
        "A Wasserstein critic has a gradient penalty with weight 10 in every batch.",
        loss="wasserstein",
        penalty="between",
        factor=10.0,
    ),
    kind(
        "Wasserstein losses around zero",
        LOSSES,
        "The critic's loss is near zero and changes its sign.",
        loss="wasserstein",
        penalty="between",
        factor=1.0,
        critic_steps=2,
        rate=2e-3,
    ),
)
