"""Kinds whose losses reach zero, are near zero, are negative, or have an unusual scale.

Imports Lightning and torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.healthy.kind import LOSSES, Kind
from benchmarks.healthy.networks import (
    Loss,
    Net,
    adam,
    classes,
    clusters,
    generator,
    inputs,
    loader,
    mlp,
    regression,
    sgd,
    squared_error,
)


def separable(seed: int, margin: float = 1.0) -> DataLoader[Any]:
    """Returns points with labels of -1 and 1 that a line separates with a margin."""
    x, normal = inputs(seed, 1600), torch.randn(8, 1, generator=generator(seed + 7))
    y = (x @ normal).sign()
    return loader(x + margin * y * normal.t() / normal.norm(), y)


def linear_task(seed: int) -> DataLoader[Any]:
    """Returns a linear function of the inputs, without noise."""
    x = inputs(seed, 1600)
    return loader(x, x @ torch.randn(8, 1, generator=generator(seed + 7)))


def zeros(seed: int) -> DataLoader[Any]:
    """Returns inputs of which the targets are zero."""
    return loader(inputs(seed, 1600), torch.zeros(1600, 1))


def narrow(seed: int) -> DataLoader[Any]:
    """Returns points in a narrow normal distribution, whose log density is large."""
    noise = torch.randn(1600, 4, generator=generator(seed))
    return loader(torch.arange(4.0) + 0.01 * noise)


def hinge(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.relu(1 - batch[1] * net(batch[0])).mean()


def squared_hinge(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.relu(1 - batch[1] * net(batch[0])).square().mean()


def perceptron(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.relu(-batch[1] * net(batch[0])).mean()


def logistic(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.softplus(-batch[1] * net(batch[0])).mean()


def unstable_logistic(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Returns the logistic loss of which small values are rounded to 0 or to 1.2e-7."""
    return -torch.sigmoid(batch[1] * net(batch[0])).log().mean()


def triplet(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Compares each sample with one of its class and one of another."""
    x, y = batch
    z, order = net(x), y.argsort()
    z, y = z[order], y[order]
    positive, negative = (y[:-1] == y[1:])[:, None], y[:, None] != y[None, :]
    near = (z[:-1] - z[1:]).square().sum(1, keepdim=True)
    far = torch.cdist(z[:-1], z).square()
    return (F.relu(near - far + 1) * (positive & negative[:-1])).mean()


def margin_ranking(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, y = batch
    score, other = net(x), net(x.flip(0))
    return F.margin_ranking_loss(score, other, (y - y.flip(0)).sign(), margin=0.1)


def cosine(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return 1 - F.cosine_similarity(net(batch[0]), batch[0]).mean()


def negative_cosine(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return -F.cosine_similarity(net(batch[0]), batch[0]).mean()


def negative_reward(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Returns a loss that falls from about 0 to large negative values."""
    return -(torch.tanh(net(batch[0])) * batch[1].sign()).mean() * 100


def mutual_information(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Returns the negative Donsker-Varadhan bound between a sample and its noisy copy."""
    x = batch[0]
    joint = net(torch.cat([x, x + 0.5 * torch.randn_like(x)], 1))
    apart = net(torch.cat([x, x.roll(1, 0) + 0.5 * torch.randn_like(x)], 1))
    return -(joint.mean() - apart.logsumexp(0)[0] + torch.tensor(float(len(x))).log())


def scaled(loss: Loss, factor: float) -> Loss:
    return lambda net, batch: factor * loss(net, batch)


def sum_of_squares(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1], reduction="sum")


class FreeBits(Net):
    """A variational autoencoder whose KL term has a floor below which it has no gradient.

    Args:
        floor: Of the KL term, nats for each latent.
        only_kl: The reconstruction has no weight, so that the whole loss stays at the floor.
    """

    def __init__(self, floor: float, only_kl: bool = False) -> None:
        super().__init__(net=nn.ModuleList([mlp(8, 8), mlp(4, 8)]))
        self.floor, self.only_kl = floor, only_kl

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns reconstruction and KL; judged by the sum."""
        x = batch[0]
        mean, log_variance = self.net[0](x).chunk(2, 1)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean(0)
        floored = kl.clamp(min=self.floor).sum() - 4 * self.floor
        if self.only_kl:
            return self.track(floored)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.track(F.mse_loss(self.net[1](z), x) + 0.1 * floored)


class Density(Net):
    """Fits a normal distribution by the negative log likelihood, which falls far below zero.

    Args:
        rate: Learning rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(optimizer=lambda p: torch.optim.Adam(p, rate))
        self.mean = nn.Parameter(torch.zeros(4))
        self.log_scale = nn.Parameter(torch.zeros(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative log likelihood of four coordinates."""
        normal = torch.distributions.Normal(self.mean, self.log_scale.exp())
        return self.track(-normal.log_prob(batch[0]).sum(1).mean())


class Flow(Net):
    """A flow of affine couplings on narrow data; its loss falls below zero."""

    def __init__(self) -> None:
        super().__init__(net=nn.ModuleList([mlp(2, 4, 32) for _ in range(4)]))
        for layer in self.net:
            nn.init.zeros_(layer[4].weight)
        self.shift, self.log_scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative log likelihood."""
        z = (batch[0] - self.shift) * self.log_scale.exp()
        log_slope = self.log_scale.sum()
        for layer in self.net:
            kept, moved = z.chunk(2, 1)
            scale, shift = layer(kept).chunk(2, 1)
            z = torch.cat([moved * scale.tanh().exp() + shift, kept], 1)
            log_slope = log_slope + scale.tanh().sum(1).mean()
        return self.track(0.5 * z.square().sum(1).mean() - log_slope)


class Reversed(Net):
    """A domain classifier behind a gradient reversal: its loss stays at log 2."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(64, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the task's loss and that of the domain; judged by the task's loss."""
        x, y = batch
        h = self.net[:4](x)
        reverse = h.detach() * 1.1 - h * 0.1
        domain = (torch.arange(len(x)) % 2).float()[:, None]
        confusion = F.binary_cross_entropy_with_logits(self.domain(reverse), domain)
        main = F.mse_loss(self.net[4](h), y)
        return self.track(main + confusion, main)


class Detached(Net):
    """Learns to a loss of exactly 0 in half of the steps: nothing of that batch is labelled."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of the labelled samples, or a zero that has a graph."""
        x, y = batch
        error = (self.net(x) - y).square()
        labelled = (torch.rand(()) < 0.5).float()
        return self.track((error * labelled).mean(), error.mean())


def kind(name: str, practice: str, module: Any = Net, **options: Any) -> Kind:
    own = {k: options.pop(k) for k in ("steps", "data", "trainer", "floor") if k in options}
    return Kind(
        name=name, group=LOSSES, practice=practice, module=partial(module, **options), **own
    )


def wide(inputs: int = 8, outputs: int = 8) -> Any:
    """Returns a module whose network has these inputs and outputs, made when it is called."""
    return lambda **options: Net(mlp(inputs, outputs), **options)


def linear(**options: Any) -> Net:
    return Net(nn.Linear(8, 1), **options)


def linear_map(**options: Any) -> Net:
    return Net(nn.Linear(8, 8), **options)


def equal_norms(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Returns the difference of two norms that are equal but for the order of their sums."""
    h = net[:4](batch[0])
    return (h.square().sum() / len(h) - h.flip(1).square().sum(1).mean()).abs()


def saturated(seed: int = 0, **options: Any) -> Net:
    """Returns a linear classifier that solves `separable` with logits of 18 and more."""
    net, normal = nn.Linear(8, 1, bias=False), torch.randn(8, 1, generator=generator(seed + 7))
    net.weight.data.copy_(18 * normal.t() / normal.norm())
    return Net(net, **options)


def solved(**options: Any) -> Net:
    """Returns a network that solves the task with zero targets from the start."""
    net = mlp()
    nn.init.zeros_(net[4].weight)
    nn.init.zeros_(net[4].bias)
    return Net(net, **options)


KINDS = (
    kind(
        "hinge loss on separable data",
        "The hinge loss becomes exactly 0 once all samples are beyond the margin.",
        loss=hinge,
        data=separable,
        steps=300,
    ),
    kind(
        "hinge loss on separable data, linear, SGD",
        "A linear classifier with the hinge loss and SGD.",
        linear,
        loss=hinge,
        optimizer=sgd,
        data=separable,
        steps=400,
        floor=0.0,
    ),
    kind(
        "hinge loss with a small margin, linear",
        "Most batches have a hinge loss of 0, the others a small one, for a long time.",
        linear,
        loss=hinge,
        data=partial(separable, margin=0.1),
        steps=400,
    ),
    kind(
        "squared hinge on separable data",
        "The squared hinge loss becomes exactly 0, and its gradients very small before.",
        loss=squared_hinge,
        data=separable,
        steps=400,
    ),
    kind(
        "perceptron on separable data",
        "The perceptron's loss is exactly 0 on most batches.",
        linear,
        loss=perceptron,
        optimizer=sgd,
        data=separable,
        steps=300,
        floor=0.0,
    ),
    kind(
        "perceptron with a small margin",
        "The perceptron's loss is exactly 0 on some batches and small on the others.",
        linear,
        loss=perceptron,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        data=partial(separable, margin=0.02),
        steps=400,
    ),
    kind(
        "logistic loss on separable data",
        "The logistic loss falls to 1e-7 and below, while the weights grow.",
        loss=logistic,
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
        data=separable,
        steps=400,
    ),
    kind(
        "triplet loss, mostly zero",
        "A triplet loss that is exactly 0 on most batches after some steps.",
        wide(8, 4),
        loss=triplet,
        data=partial(classes, spread=0.3),
        steps=300,
        floor=0.0,
    ),
    kind(
        "triplet loss, hard classes",
        "A triplet loss on classes that overlap a little, often exactly 0 in the end.",
        wide(8, 4),
        loss=triplet,
        data=partial(classes, spread=1.5),
        steps=300,
    ),
    kind(
        "margin ranking loss",
        "Pairs are ranked with a margin.",
        loss=margin_ranking,
        data=linear_task,
    ),
    kind(
        "solved task at 1e-7",
        "A linear task without noise is solved to rounding errors.",
        linear,
        optimizer=lambda p: torch.optim.Adam(p, 0.05),
        data=linear_task,
        steps=400,
    ),
    kind(
        "solved task, SGD to rounding errors",
        "The same with SGD, whose loss falls below 1e-12.",
        linear,
        optimizer=lambda p: torch.optim.SGD(p, 0.1),
        data=linear_task,
        steps=400,
    ),
    kind(
        "solved from the start",
        "The loss is exactly 0 in every step, as for a part that is already solved.",
        solved,
        data=zeros,
        floor=0.0,
    ),
    kind(
        "targets of zero",
        "All targets are 0, and the loss falls to zero.",
        data=zeros,
        steps=300,
    ),
    kind(
        "loss of exactly zero in half of the steps",
        "Batches without labels have a loss of exactly 0 and gradients of 0.",
        Detached,
    ),
    kind(
        "KL with free bits",
        "The KL term has a floor below which it has no gradient.",
        partial(FreeBits, floor=0.5),
        data=clusters,
    ),
    kind(
        "KL with free bits, at its floor",
        "The loss is a KL term that reaches its floor, where loss and gradients are exactly 0.",
        partial(FreeBits, floor=0.05, only_kl=True),
        data=clusters,
        floor=1e-9,
    ),
    kind(
        "negative log likelihood falls to -10",
        "The density of narrow data grows, and the loss falls through 0 to about -12.",
        partial(Density, rate=0.05),
        data=narrow,
        steps=300,
    ),
    kind(
        "negative log likelihood falls fast",
        "The same at twice the learning rate, with losses of several 100 at the start.",
        partial(Density, rate=0.1),
        data=narrow,
        steps=300,
    ),
    kind(
        "flow, negative log likelihood",
        "A normalising flow on narrow data, whose loss falls below zero.",
        Flow,
        data=narrow,
        steps=300,
    ),
    kind(
        "cosine loss",
        "One minus the cosine similarity, which falls to zero.",
        wide(),
        loss=cosine,
    ),
    kind(
        "negative cosine loss",
        "The loss is the negative cosine similarity and falls to -1.",
        wide(),
        loss=negative_cosine,
    ),
    kind(
        "reward as a negative loss",
        "The loss is a negative reward and falls from 0 to about -90.",
        loss=negative_reward,
    ),
    kind(
        "mutual information bound",
        "The loss is a negative bound on mutual information, and begins at zero.",
        wide(16, 1),
        loss=mutual_information,
        steps=300,
    ),
    kind(
        "gradient reversal",
        "A domain classifier behind a gradient reversal stays at chance.",
        Reversed,
    ),
    kind(
        "loss x1e6",
        "The loss has a scale of 1e6, with Adam.",
        loss=scaled(squared_error, 1e6),
    ),
    kind(
        "loss x1e-6",
        "The loss has a scale of 1e-6, with Adam.",
        loss=scaled(squared_error, 1e-6),
    ),
    kind(
        "loss x1e6, SGD with a small learning rate",
        "The loss has a scale of 1e6, and the learning rate one of 1e-6.",
        loss=scaled(squared_error, 1e6),
        optimizer=lambda p: torch.optim.SGD(p, 2e-8, momentum=0.9),
    ),
    kind(
        "loss x1e-6, SGD with a large learning rate",
        "The loss has a scale of 1e-6, and the learning rate one of 1e6.",
        loss=scaled(squared_error, 1e-6),
        optimizer=lambda p: torch.optim.SGD(p, 2e4, momentum=0.9),
    ),
    kind(
        "summed loss",
        "The loss is a sum over the samples, clipped, with a smaller last batch.",
        loss=sum_of_squares,
        data=partial(regression, count=1610),
        trainer=lambda: {"gradient_clip_val": 10.0},
    ),
    kind(
        "classification to a loss of 1e-4",
        "Well separated classes are learnt to a cross entropy near zero.",
        wide(8, 4),
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        optimizer=adam,
        data=partial(classes, spread=0.2),
        steps=300,
    ),
    kind(
        "classification to a loss of exactly 0",
        "Confident predictions have a cross entropy of 0 or, by rounding, 1.2e-7.",
        wide(8, 4),
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        optimizer=lambda p: torch.optim.Adam(p, 0.02),
        data=partial(classes, spread=0.1),
        steps=400,
    ),
    kind(
        "cosine loss of a solved task",
        "One minus the cosine similarity is 0, 1.2e-7 or, by rounding, negative.",
        linear_map,
        loss=cosine,
        optimizer=lambda p: torch.optim.Adam(p, 0.05),
        steps=400,
    ),
    kind(
        "hinge loss that is 0 from the first steps on",
        "Classes far apart, so that the hinge loss is 0 but for a few batches.",
        loss=hinge,
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
        data=partial(separable, margin=3.0),
        floor=0.0,
    ),
    kind(
        "loss of a solved part with rounding errors",
        "The loss is a difference of two equal norms: 0 in most steps, 1e-7 in some.",
        loss=equal_norms,
        floor=1e-5,
    ),
    kind(
        "loss of exactly 0 that weight decay brings back",
        "A saturated classifier has a loss of exactly 0, until weight decay makes it 1e-7.",
        saturated,
        loss=unstable_logistic,
        optimizer=lambda p: torch.optim.SGD(p, 1.0, weight_decay=1e-3),
        data=separable,
        steps=400,
        floor=1e-4,
    ),
)
