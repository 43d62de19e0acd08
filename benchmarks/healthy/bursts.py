"""Kinds whose gradients are large now and then, or from some step on, and harm nothing.

Imports Lightning and torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

from benchmarks.healthy.kind import GRADIENTS, Kind
from benchmarks.healthy.networks import (
    Net,
    adam,
    adamw,
    classes,
    clusters,
    generator,
    inputs,
    leaky_sum,
    loader,
    mlp,
    sgd,
    surface,
)


class TwoHeads(Net):
    """A second head adds its loss in some steps.

    Args:
        factor: Of the second loss.
        every: The second loss is added every so many batches, if given.
        share: Probability of the second loss in a step, if ``every`` is not given.
        start: First step with the second loss.
        replaces: The second loss replaces the first one instead of being added.
        **options: See `Net`.
    """

    def __init__(
        self,
        factor: float,
        every: int | None = None,
        share: float = 1.0,
        start: int = 0,
        replaces: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.second = nn.Linear(64, 8)
        self.factor, self.every, self.share = factor, every, share
        self.start, self.replaces = start, replaces

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns one loss, or both."""
        x, y = batch
        h = self.net[:4](x)
        main = F.mse_loss(self.net[4](h), y)
        if not self._due():
            return self.track(main)
        extra = self.factor * F.mse_loss(self.second(h), x)
        return self.track(extra if self.replaces else main + extra, main)

    def _due(self) -> bool:
        if self.global_step < self.start:
            return False
        if self.every is not None:
            return self.global_step % self.every == self.every - 1
        return bool(torch.rand(()) < self.share)


class Policy(Net):
    """REINFORCE on a contextual bandit whose returns have a heavy tail.

    Args:
        returns: "lognormal", "pareto", "sparse": 20 in 5 % of the batches and else 0, or
            "jackpot": 0.2 % of the rewards are 1,000 times as large.
        **options: See `Net`.
    """

    def __init__(self, returns: str, **options: Any) -> None:
        super().__init__(net=mlp(8, 4), **options)
        self.returns = returns

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the policy's surrogate loss; judged by the probability of the right action."""
        x, best = batch
        policy = torch.distributions.Categorical(logits=self.net(x))
        action = policy.sample()
        reward = (action == best).float() * self._draw(len(x))
        advantage = reward - reward.mean()
        loss = -(advantage * policy.log_prob(action)).mean()
        return self.track(loss, 1 - policy.probs.gather(1, best[:, None]).mean())

    def _draw(self, count: int) -> Tensor:
        if self.returns == "lognormal":
            return torch.randn(count).mul(2.0).exp()
        if self.returns == "sparse":
            return torch.full((count,), 20.0 * float(torch.rand(()) < 0.05))
        if self.returns == "pareto":
            return torch.rand(count).clamp(min=1e-6) ** (-1 / 1.5)
        return torch.where(torch.rand(count) < 0.002, 1000.0, 1.0)


class HeavyTails(Net):
    """A regression on targets with heavy-tailed noise, judged on the clean ones."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss on noisy targets."""
        x, noisy, clean = batch
        prediction = self.net(x)
        return self.track(self.loss(prediction, noisy), F.mse_loss(prediction, clean))


def heavy_tailed(seed: int, degrees: float, scale: float = 0.3, batch: int = 32) -> DataLoader[Any]:
    """Returns inputs, targets with Student's t noise, and clean targets."""
    x = inputs(seed, 3200)
    normal = torch.randn(3200, 1, generator=generator(seed + 4))
    gamma = torch._standard_gamma(torch.full((3200, 1), degrees / 2), generator=generator(seed + 5))
    noise = normal * (degrees / (2 * gamma.clamp(min=1e-12))).sqrt()
    return loader(x, surface(x) + scale * noise, surface(x), batch=batch)


def with_outliers(seed: int) -> DataLoader[Any]:
    """Returns inputs of which 1 % are 30 times as large; the targets are those of clean inputs."""
    x = inputs(seed, 3200)
    large = torch.rand(3200, 1, generator=generator(seed + 6)) < 0.01
    return loader(torch.where(large, 30 * x, x), surface(x), surface(x))


class Curriculum(Net):
    """The data become harder in stages: larger inputs, other targets, or more noise.

    Args:
        every: Steps of a stage.
        factor: Of the targets from one stage to the next.
        **options: See `Net`.
    """

    def __init__(self, every: int, factor: float, **options: Any) -> None:
        super().__init__(**options)
        self.every, self.factor = every, factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the error relative to the scale of the stage; the loss itself is absolute."""
        x, y = batch
        scale = self.factor ** (self.global_step // self.every)
        loss = F.mse_loss(self.net(x * scale**0.5), y * scale)
        return self.track(loss, loss.detach() / scale**2)


class Annealed(Net):
    """A variational autoencoder whose KL term is weighted by a schedule.

    Args:
        weight: Maps the step to the weight.
        **options: See `Net`.
    """

    def __init__(self, weight: Any, **options: Any) -> None:
        super().__init__(net=nn.ModuleList([mlp(8, 8), mlp(4, 8)]), **options)
        self.weight = weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns reconstruction and weighted KL; judged by the reconstruction."""
        x = batch[0]
        mean, log_variance = self.net[0](x).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        reconstruction = F.mse_loss(self.net[1](z), x)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return self.track(reconstruction + self.weight(self.global_step) * kl, reconstruction)


class SlopePenalty(Net):
    """Adds a penalty on the slope of the network from some step on.

    Args:
        start: First step with the penalty.
        factor: Of the penalty.
        every: Steps from one penalty to the next.
        **options: See `Net`.
    """

    def __init__(self, start: int, factor: float, every: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.start, self.factor, self.every = start, factor, every

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss, with the penalty when it is due; judged by the loss alone."""
        x, y = batch
        x = x.requires_grad_()
        prediction = self.net(x)
        main = F.mse_loss(prediction, y)
        if self.global_step < self.start or self.global_step % self.every:
            return self.track(main)
        (slope,) = torch.autograd.grad(prediction.sum(), x, create_graph=True)
        return self.track(main + self.factor * ((slope.norm(dim=1) - 1) ** 2).mean(), main)


class Focal(Net):
    """Classifies a rare class with the focal loss.

    Args:
        gamma: Exponent of the loss.
        weight: Weight of the rare class.
    """

    def __init__(self, gamma: float = 2.0, weight: float = 20.0) -> None:
        super().__init__()
        self.gamma, self.weight = gamma, weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the sum over the batch, divided by the number of rare samples."""
        x, y = batch
        rare = (y == 0).float()
        logits = self.net(x)[:, 0]
        error = F.binary_cross_entropy_with_logits(logits, rare, reduction="none")
        focus = (1 - (-error).exp()) ** self.gamma * (1 + (self.weight - 1) * rare)
        return self.track((focus * error).sum() / rare.sum().clamp(min=1))


class Queue(Net):
    """Contrasts views of a sample with a queue of earlier keys, which grows at first."""

    def __init__(self) -> None:
        super().__init__(net=mlp(8, 16))
        self.keys = mlp(8, 16).requires_grad_(False)
        self.register_buffer("queue", torch.empty(0, 16))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the contrastive loss; judged by the rank of the right key among 32."""
        x = batch[0]
        query = F.normalize(self.net(x + 0.1 * torch.randn_like(x)), dim=1)
        with torch.no_grad():
            key = F.normalize(self.keys(x + 0.1 * torch.randn_like(x)), dim=1)
        logits = query @ torch.cat([key, self.queue]).t() / 0.1
        labels = torch.arange(len(x))
        loss = F.cross_entropy(logits, labels)
        self.queue = torch.cat([key, self.queue])[:1024]
        return self.track(loss, F.cross_entropy(logits[:, : len(x)].detach(), labels))

    def on_train_batch_end(self, *args: Any) -> None:
        """Moves the encoder of the keys."""
        with torch.no_grad():
            for slow, fast in zip(self.keys.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.05)


class Words(Net):
    """Classifies bags of words, whose frequencies follow Zipf's law, with sparse gradients.

    Args:
        sparse: The embedding has sparse gradients.
        optimizer: Creates the optimizer.
    """

    def __init__(self, sparse: bool, optimizer: Any) -> None:
        embedding = nn.EmbeddingBag(500, 16, sparse=sparse)
        super().__init__(net=nn.ModuleList([embedding, nn.Linear(16, 2)]), optimizer=optimizer)
        self.register_buffer("frequencies", 1 / torch.arange(1, 501).float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the cross entropy; the class is the parity of most of the words."""
        words = self.frequencies.expand(32, -1).multinomial(7)
        logits = self.net[1](self.net[0](words))
        return self.track(F.cross_entropy(logits, (words % 2).sum(1) // 4))


class SparseAndDense(Words):
    """The embedding has its own sparse optimizer; both step by hand."""

    def __init__(self) -> None:
        super().__init__(sparse=True, optimizer=adam)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Steps both optimizers on one backward pass."""
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        """Returns a sparse and a dense optimizer."""
        sparse = torch.optim.SparseAdam(self.net[0].parameters(), 0.02)
        return [sparse, torch.optim.Adam(self.net[1].parameters(), 0.02)]


class Recurrent(Net):
    """Predicts a running sum of a sequence by a GRU.

    Args:
        longest: Maps the step to the largest length.
        reduction: Of the loss over the elements; "sum" makes long batches larger.
        packed: Draws a length for each sample, and packs the sequences.
        **options: See `Net`.
    """

    def __init__(
        self, longest: Any, reduction: str = "mean", packed: bool = False, **options: Any
    ) -> None:
        nets = nn.ModuleList([nn.GRU(2, 24, batch_first=True), nn.Linear(24, 1)])
        super().__init__(net=nets, **options)
        self.longest, self.reduction, self.packed = longest, reduction, packed

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the error of every step; judged by the mean over the elements."""
        length = int(self.longest(self.global_step))
        x = torch.randn(16, length, 2)
        y = leaky_sum(x)
        output = self.net[1](self._states(x, length))
        loss = F.mse_loss(output, y[:, : output.shape[1]], reduction=self.reduction)
        return self.track(loss, F.mse_loss(output, y[:, : output.shape[1]]))

    def _states(self, x: Tensor, length: int) -> Tensor:
        if not self.packed:
            return self.net[0](x)[0]
        lengths = torch.randint(1, length + 1, (16,))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.net[0](packed)[0], batch_first=True)[0]


class WrongLabels(Net):
    """A classifier that gets shuffled labels in a few batches; judged on the other batches.

    Args:
        share: Of the batches with shuffled labels.
    """

    def __init__(self, share: float) -> None:
        super().__init__(mlp(8, 4))
        self.share = share

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the cross entropy; judged by that of the right labels."""
        x, y = batch
        logits = self.net(x)
        given = y[torch.randperm(len(y))] if torch.rand(()) < self.share else y
        return self.track(F.cross_entropy(logits, given), F.cross_entropy(logits, y))


class OtherDomain(Net):
    """Every so many batches come from another domain, with larger inputs.

    Args:
        every: Batches from one of them to the next.
        factor: Of the inputs.
        **options: See `Net`.
    """

    def __init__(self, every: int, factor: float, **options: Any) -> None:
        super().__init__(**options)
        self.every, self.factor = every, factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of either domain; judged by that of the usual one."""
        x, y = batch
        other = self.global_step % self.every == self.every - 1
        loss = F.mse_loss(self.net(self.factor * x if other else x), y)
        with torch.no_grad():
            usual = F.mse_loss(self.net(x), y)
        return self.track(loss, usual)


class Weighted(TwoHeads):
    """The second head's loss has a weight that follows a schedule.

    Args:
        weight: Maps the step to the weight.
        **options: See `Net`.
    """

    def __init__(self, weight: Any, **options: Any) -> None:
        super().__init__(1.0, **options)
        self.weight = weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns both losses, the second with its present weight."""
        self.factor = self.weight(self.global_step)
        return super().training_step(batch, batch_idx)


class HardExamples(Net):
    """Trains only on the hardest quarter of a batch from some step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean error, of all samples or of the hardest ones."""
        errors = (self.net(batch[0]) - batch[1]).square().flatten()
        hard = errors if self.global_step < 100 else errors.topk(len(errors) // 4).values
        return self.track(hard.mean(), errors.mean())


class Alternating(Net):
    """Two tasks with losses of other scales alternate in blocks.

    Args:
        block: Batches of one task in a row.
        factor: Scale of the second task.
        **options: See `Net`.
    """

    def __init__(self, block: int, factor: float, **options: Any) -> None:
        super().__init__(net=mlp(8, 2), **options)
        self.block, self.factor = block, factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of the task whose turn it is; judged without its scale."""
        task = self.global_step // self.block % 2
        x, y = batch
        goal = y if task == 0 else y.flip(0) * 0 + x[:, 4:5].cos()
        error = F.mse_loss(self.net(x)[:, task : task + 1], goal)
        return self.track(error * (self.factor if task else 1.0), error)


class Adversarial(Net):
    """Every fourth step trains on inputs moved along their gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss on clean or on moved inputs."""
        x, y = batch
        if self.global_step % 4 == 3:
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.mse_loss(self.net(x), y), x)
            x = (x + 0.2 * slope.sign()).detach()
        return self.track(F.mse_loss(self.net(x), y))


class Physics(Net):
    """Solves u'' = -sin(t) with u(0) = u(pi) = 0, by second derivatives of the network."""

    def __init__(self) -> None:
        layers = [nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
        super().__init__(net=nn.Sequential(*layers))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the residual of the equation and of the boundary."""
        t = (torch.rand(32, 1) * torch.pi).requires_grad_()
        u = self.net(t)
        (first,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), t, create_graph=True)
        edge = self.net(torch.tensor([[0.0], [torch.pi]])).square().mean()
        return self.track((second + t.sin()).square().mean() + 10 * edge)


def kind(name: str, practice: str, module: Any, **options: Any) -> Kind:
    return Kind(name=name, group=GRADIENTS, practice=practice, module=module, **options)


def clipped(value: float = 1.0) -> Any:
    return lambda: {"gradient_clip_val": value}


KINDS = (
    kind(
        "auxiliary loss x30 every 50 steps",
        "A second head adds 30 times its loss in every 50th step.",
        partial(TwoHeads, 30, every=50),
    ),
    kind(
        "auxiliary loss x100 every 50 steps",
        "A second head adds 100 times its loss in every 50th step.",
        partial(TwoHeads, 100, every=50),
        steps=300,
    ),
    kind(
        "auxiliary loss x300 every 50 steps, AdamW",
        "A second head adds 300 times its loss in every 50th step.",
        partial(TwoHeads, 300, every=50, optimizer=adamw),
        steps=400,
    ),
    kind(
        "auxiliary loss x100 every 50 steps, clipped",
        "The same with SGD, and gradients clipped to a norm of 1.",
        partial(TwoHeads, 100, every=50, optimizer=sgd),
        steps=300,
        trainer=clipped(),
    ),
    kind(
        "auxiliary loss x30 every 10 steps",
        "A second head adds 30 times its loss in every 10th step.",
        partial(TwoHeads, 30, every=10),
    ),
    kind(
        "auxiliary loss x100 from step 100 on",
        "A second head joins with a large loss at step 100.",
        partial(TwoHeads, 100, start=100),
        steps=300,
    ),
    kind(
        "auxiliary loss x1000 every 50 steps, clipped",
        "A second head adds 1,000 times its loss in every 50th step, clipped to a norm of 1.",
        partial(TwoHeads, 1000, every=50),
        steps=300,
        trainer=clipped(),
    ),
    kind(
        "weight of a loss annealed from 1 to 100",
        "The weight of a second loss rises from 1 to 100 in 200 steps.",
        partial(Weighted, lambda step: 100 ** min(1.0, step / 200)),
        steps=300,
    ),
    kind(
        "weight of a loss x10 at step 80 and at step 160",
        "The weight of a second loss is raised by a factor of ten, twice.",
        partial(Weighted, lambda step: 10.0 ** (step // 80)),
    ),
    kind(
        "weight of a loss alternates between 0 and 30",
        "A second loss is switched on and off every 30 steps.",
        partial(Weighted, lambda step: 30.0 * (step // 30 % 2)),
    ),
    kind(
        "3 % of the batches with shuffled labels",
        "Some batches have wrong labels, after the others are learnt almost perfectly.",
        partial(WrongLabels, 0.03),
        data=partial(classes, spread=0.3),
        steps=400,
    ),
    kind(
        "every 40th batch of another domain, inputs x10",
        "Every 40th batch has inputs ten times as large.",
        partial(OtherDomain, 40, 10.0),
        steps=300,
    ),
    kind(
        "every 25th batch of another domain, inputs x30, clipped",
        "Every 25th batch has inputs thirty times as large; gradients are clipped.",
        partial(OtherDomain, 25, 30.0, optimizer=sgd),
        steps=300,
        trainer=clipped(0.5),
    ),
    kind(
        "rare modality in 3 % of the steps, x30",
        "3 % of the steps, at random, train another head with a loss 30 times as large.",
        partial(TwoHeads, 30, share=0.03, replaces=True),
        steps=400,
    ),
    kind(
        "rare modality in 3 % of the steps, x100",
        "3 % of the steps, at random, add another head's loss, 100 times as large.",
        partial(TwoHeads, 100, share=0.03),
        steps=400,
    ),
    kind(
        "rare modality in 1 % of the steps, x100, clipped",
        "1 % of the steps add another head's loss, 100 times as large; gradients are clipped.",
        partial(TwoHeads, 100, share=0.01, optimizer=sgd),
        steps=400,
        trainer=clipped(),
    ),
    kind(
        "rare modality in every 37th batch, x30",
        "Every 37th batch trains another head with a loss 30 times as large.",
        partial(TwoHeads, 30, every=37, replaces=True),
        steps=300,
    ),
    kind(
        "two tasks in blocks of 25 steps, x10",
        "Two tasks alternate in blocks of 25 steps; the losses of one are 10 times as large.",
        partial(Alternating, 25, 10.0),
        steps=300,
    ),
    kind(
        "two tasks in turn, x30",
        "Two tasks alternate batch by batch; the losses of one are 30 times as large.",
        partial(Alternating, 1, 30.0),
    ),
    kind(
        "REINFORCE, lognormal returns",
        "A policy gradient on a bandit whose returns are lognormal.",
        partial(Policy, "lognormal"),
        data=classes,
        steps=300,
    ),
    kind(
        "REINFORCE, Pareto returns",
        "A policy gradient on a bandit whose returns have an infinite variance.",
        partial(Policy, "pareto"),
        data=classes,
        steps=300,
    ),
    kind(
        "REINFORCE, jackpots",
        "A policy gradient on a bandit in which 0.2 % of the rewards are 1,000 times as large.",
        partial(Policy, "jackpot"),
        data=classes,
        steps=400,
    ),
    kind(
        "REINFORCE, sparse returns",
        "A policy gradient on a bandit that returns nothing in 95 % of the batches.",
        partial(Policy, "sparse"),
        data=classes,
        steps=400,
    ),
    kind(
        "REINFORCE, jackpots, clipped",
        "The same bandit as with jackpots; gradients are clipped to a norm of 1.",
        partial(Policy, "jackpot"),
        data=classes,
        steps=400,
        trainer=clipped(),
    ),
    kind(
        "Student's t targets",
        "Squared error on targets whose noise has 2.5 degrees of freedom.",
        partial(HeavyTails, loss=F.mse_loss),
        data=partial(heavy_tailed, degrees=2.5),
        steps=300,
    ),
    kind(
        "Student's t targets, clipped, SGD",
        "The same with SGD, and gradients clipped to a norm of 1.",
        partial(HeavyTails, loss=F.mse_loss, optimizer=sgd),
        data=partial(heavy_tailed, degrees=2.5),
        steps=300,
        trainer=clipped(),
    ),
    kind(
        "Student's t targets, batches of 4",
        "The same with 1.5 degrees of freedom, in batches in which one sample weighs a quarter.",
        partial(HeavyTails, loss=F.mse_loss),
        data=partial(heavy_tailed, degrees=1.5, scale=0.1, batch=4),
        steps=400,
    ),
    kind(
        "Cauchy targets, clipped",
        "Squared error on targets with Cauchy noise, clipped to a norm of 1, with SGD.",
        partial(HeavyTails, loss=F.mse_loss, optimizer=sgd),
        data=partial(heavy_tailed, degrees=1.0),
        steps=400,
        trainer=clipped(),
    ),
    kind(
        "Cauchy targets, Adam without clipping",
        "Squared error on targets with weak Cauchy noise, whose rare gradients Adam absorbs.",
        partial(HeavyTails, loss=F.mse_loss),
        data=partial(heavy_tailed, degrees=1.0, scale=0.02),
        steps=400,
    ),
    kind(
        "Cauchy targets, Adam without clipping, strong noise",
        "Squared error on targets with Cauchy noise and no clipping, with a small learning rate.",
        partial(HeavyTails, loss=F.mse_loss),
        data=partial(heavy_tailed, degrees=1.0, scale=0.1),
        steps=400,
    ),
    kind(
        "Cauchy targets, Huber loss",
        "Huber loss on targets with Cauchy noise.",
        partial(HeavyTails, loss=F.smooth_l1_loss),
        data=partial(heavy_tailed, degrees=1.0),
        steps=300,
    ),
    kind(
        "1 % of the inputs x30",
        "1 % of the samples are outliers with inputs 30 times as large.",
        partial(HeavyTails, loss=F.smooth_l1_loss),
        data=with_outliers,
        steps=300,
        trainer=clipped(),
    ),
    kind(
        "slope penalty from step 100 on",
        "A penalty on the slope of the network begins at step 100.",
        partial(SlopePenalty, 100, 10.0),
    ),
    kind(
        "slope penalty every 16th step",
        "A penalty on the slope, 16 times as large, is computed in every 16th step.",
        partial(SlopePenalty, 0, 16.0, every=16),
    ),
    kind(
        "curriculum, targets x3 every 80 steps",
        "Every 80 steps the targets become 3 times as large.",
        partial(Curriculum, 80, 3.0),
        steps=300,
    ),
    kind(
        "curriculum, targets x10 at step 120",
        "At step 120 inputs and targets become larger.",
        partial(Curriculum, 120, 10.0),
        steps=239,
    ),
    kind(
        "hard examples from step 100 on",
        "From step 100 on, only the hardest quarter of each batch counts.",
        HardExamples,
    ),
    kind(
        "adversarial examples every 4th step",
        "Every fourth step trains on inputs moved along their gradient.",
        Adversarial,
    ),
    kind(
        "KL weight annealed from 0 to 1",
        "The KL term of a variational autoencoder is weighted by a ramp of 150 steps.",
        partial(Annealed, lambda step: min(1.0, step / 150) * 0.2),
        data=clusters,
    ),
    kind(
        "KL weight cyclical",
        "The KL term's weight rises from 0 in each cycle of 60 steps.",
        partial(Annealed, lambda step: (step % 60) / 60 * 0.2),
        data=clusters,
    ),
    kind(
        "KL weight steps from 0 to 1",
        "The KL term begins at step 80 with its full weight.",
        partial(Annealed, lambda step: 0.2 * (step >= 80)),
        data=clusters,
    ),
    kind(
        "focal loss on a rare class",
        "The focal loss of a class of 2 % is divided by the number of its samples in the batch.",
        Focal,
        data=partial(classes, number=50),
        steps=300,
    ),
    kind(
        "contrastive loss with a growing queue",
        "A queue of negative keys grows from 0 to 1,024 in the first steps, as in MoCo.",
        Queue,
    ),
    kind(
        "rare words, dense gradients",
        "Embeddings of rare words have gradients in few steps.",
        partial(Words, False, lambda p: torch.optim.Adagrad(p, 0.1)),
        steps=400,
    ),
    kind(
        "rare words, sparse gradients, SGD",
        "The embedding has sparse gradients, with plain SGD.",
        partial(Words, True, lambda p: torch.optim.SGD(p, 1.0)),
        steps=400,
    ),
    kind(
        "rare words, SparseAdam and Adam by hand",
        "Manual optimization steps SparseAdam for the embedding and Adam for the rest.",
        SparseAndDense,
        steps=400,
    ),
    kind(
        "GRU on lengths drawn each batch",
        "Each batch has another length, from 2 to 60.",
        partial(Recurrent, lambda step: torch.randint(2, 60, ())),
    ),
    kind(
        "GRU on lengths drawn each batch, summed loss",
        "The loss is a sum over the elements, so that long batches have large gradients.",
        partial(Recurrent, lambda step: torch.randint(2, 60, ()), reduction="sum"),
        trainer=clipped(),
    ),
    kind(
        "GRU on packed sequences",
        "Each sample has its own length, and sequences are packed.",
        partial(Recurrent, lambda step: 30, packed=True),
    ),
    kind(
        "GRU on lengths that grow",
        "Sequences grow from 4 to 64 elements in four stages.",
        partial(Recurrent, lambda step: 4 ** (1 + step // 60) if step < 180 else 64),
        steps=260,
    ),
    kind(
        "physics-informed, second derivatives",
        "The loss contains second derivatives of the network with respect to its inputs.",
        Physics,
        steps=400,
    ),
)
