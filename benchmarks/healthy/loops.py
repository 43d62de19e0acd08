"""Kinds of training loops, precisions, clipping and regularisation.

Imports Lightning and torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.healthy.floors import linear_task
from benchmarks.healthy.kind import LOOPS, Kind
from benchmarks.healthy.networks import (
    Net,
    adam,
    adamw,
    classes,
    cross_entropy,
    inputs,
    leaky_sum,
    loader,
    mlp,
    regression,
    sgd,
    surface,
)


def full_batch(seed: int) -> DataLoader[Any]:
    """Returns all samples as one batch."""
    x = inputs(seed, 256)
    return loader(x, surface(x), batch=256, shuffle=False)


def fp16() -> dict[str, Any]:
    """Returns Trainer options for fp16 with loss scaling; "16-mixed" on a CPU would be bf16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=50)
    return {"plugins": MixedPrecision("16-mixed", device="cpu", scaler=scaler)}


def normalised(dropout: float = 0.0) -> nn.Sequential:
    """Returns a classifier with BatchNorm and dropout."""
    layers = [nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(64, 4))


class ByHand(Net):
    """Manual optimization with one optimizer.

    Args:
        accumulate: Batches of one optimizer step.
        clip: Largest norm of the gradient, if given.
        **options: See `Net`.
    """

    def __init__(self, accumulate: int = 1, clip: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.accumulate, self.clip = accumulate, clip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Adds to the gradient, and steps when it is due."""
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            if self.clip is not None:
                self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()
            optimizer.zero_grad()


class TwoOptimizers(Net):
    """An optimizer for the body and one for the head, in turn.

    Args:
        together: Both step on one backward pass, instead of on one each.
        every: The body steps in every so many batches.
    """

    def __init__(self, together: bool, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.together, self.every = together, every

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Steps both optimizers, or the one that is due."""
        body, head = self.optimizers()
        if self.together:
            self._step([body, head], self.track(self.loss(self.net, batch)))
            return
        self._step([head], self.track(self.loss(self.net, batch)))
        if batch_idx % self.every == 0:
            self._step([body], self.loss(self.net, batch))

    def _step(self, optimizers: list[Any], loss: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        """Returns an optimizer for the body and one for the head."""
        return [adamw(self.net[:4].parameters()), sgd(self.net[4].parameters())]


class SometimesNone(Net):
    """Skips batches by returning None from ``training_step``.

    Args:
        every: Every so many batches are skipped; 0 skips 10 % at random.
    """

    def __init__(self, every: int = 0) -> None:
        super().__init__()
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Returns the loss, or None."""
        skipped = batch_idx % self.every == 0 if self.every else bool(torch.rand(()) < 0.1)
        return None if skipped else super().training_step(batch, batch_idx)


class NoisyGradients(Net):
    """Adds annealed Gaussian noise to the gradients.

    Args:
        before_step: In ``on_before_optimizer_step`` instead of ``on_after_backward``.
        **options: See `Net`.
    """

    def __init__(self, before_step: bool, **options: Any) -> None:
        super().__init__(**options)
        self.before_step = before_step

    def on_after_backward(self) -> None:
        """Adds the noise after each backward pass."""
        if not self.before_step:
            self._add()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Adds the noise before each update."""
        if self.before_step:
            self._add()

    def _add(self) -> None:
        scale = 0.1 / (1 + self.global_step) ** 0.55
        for parameter in self.parameters():
            parameter.grad.add_(torch.randn_like(parameter), alpha=scale)


class GradientHooks(Net):
    """Changes gradients by tensor hooks: centred rows, and a clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].weight.register_hook(lambda g: g - g.mean(1, keepdim=True))
        self.net[0].weight.register_hook(lambda g: g.clamp(-0.1, 0.1))


class OwnClipping(Net):
    """Clips in ``configure_gradient_clipping``.

    Args:
        how: "norm" by Lightning's method, "each" tensor by its own norm, "none" or "quantile".
        **options: See `Net`.
    """

    def __init__(self, how: str, **options: Any) -> None:
        super().__init__(**options)
        self.how, self.norms = how, []

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients."""
        if self.how == "norm":
            self.clip_gradients(optimizer, 0.5, "norm")
        elif self.how == "each":
            for parameter in self.parameters():
                torch.nn.utils.clip_grad_norm_(parameter, 0.2)
        elif self.how == "quantile":
            self._clip_to_quantile()

    def _clip_to_quantile(self) -> None:
        """Clips to the lower decile of all norms so far, as AutoClip does."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
        self.norms.append(float(norm))
        limit = float(torch.tensor(self.norms).quantile(0.1))
        torch.nn.utils.clip_grad_norm_(self.parameters(), limit)


class Mixup(Net):
    """Mixes the samples of a batch.

    Args:
        in_place: Writes the mixed inputs into the batch.
    """

    def __init__(self, in_place: bool) -> None:
        super().__init__(normalised())
        self.in_place = in_place

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mixed cross entropy."""
        x, y = batch
        share, order = float(torch.rand(())), torch.randperm(len(x))
        mixed = share * x + (1 - share) * x[order]
        if self.in_place:
            mixed = x.copy_(mixed)
        logits = self.net(mixed)
        one, other = F.cross_entropy(logits, y), F.cross_entropy(logits, y[order])
        return self.track(share * one + (1 - share) * other)


class NoisyInputs(Net):
    """Adds noise to the inputs in place, in ``on_train_batch_start``."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Writes the noise into the batch."""
        batch[0].add_(torch.randn_like(batch[0]), alpha=0.05)


class StochasticDepth(Net):
    """Residual blocks that are left out at random, with dropout in them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2)) for _ in range(4)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of the blocks that are in; the others have no gradient."""
        x, y = batch
        h = self.net[:2](x)
        for i, block in enumerate(self.blocks):
            if torch.rand(()) > 0.1 * (i + 1):
                h = h + block(h)
        return self.track(F.mse_loss(self.net[4](h), y))


class TwoPasses(Net):
    """Sharpness-aware minimisation by hand: the gradient is taken at a worse point nearby.

    Args:
        radius: Distance of that point.
    """

    def __init__(self, radius: float = 0.05) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.radius = radius

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Moves the weights uphill, takes the gradient there, moves back and steps."""
        optimizer = self.optimizers()
        self.manual_backward(self.track(self.loss(self.net, batch)))
        moves = self._climb()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self.net, batch))
        with torch.no_grad():
            for parameter, move in zip(self.parameters(), moves, strict=True):
                parameter.sub_(move)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _climb(self) -> list[Tensor]:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
        moves = [p.grad * (self.radius / (norm + 1e-12)) for p in self.parameters()]
        for parameter, move in zip(self.parameters(), moves, strict=True):
            parameter.add_(move)
        return moves


class TwoPassesInOptimizerStep(Net):
    """The same in ``optimizer_step``, which evaluates the closure twice."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Evaluates the closure, moves, and lets the optimizer evaluate it again."""
        optimizer_closure()
        with torch.no_grad():
            moves = [0.05 * F.normalize(p.grad.flatten(), dim=0) for p in self.parameters()]
            for parameter, move in zip(self.parameters(), moves, strict=True):
                parameter.add_(move.view_as(parameter))
        optimizer.step(closure=self._then_back(optimizer_closure, moves))

    def _then_back(self, closure: Any, moves: list[Tensor]) -> Any:
        def evaluate() -> Any:
            loss = closure()
            with torch.no_grad():
                for parameter, move in zip(self.parameters(), moves, strict=True):
                    parameter.sub_(move.view_as(parameter))
            return loss

        return evaluate


class Meta(Net):
    """Learns initial weights from which an inner gradient step solves a task.

    Args:
        steps: Inner steps.
        rate: Learning rate of the inner steps.
        first_order: Leaves out the second derivatives.
    """

    def __init__(self, steps: int = 1, rate: float = 0.05, first_order: bool = False) -> None:
        super().__init__(mlp(1))
        self.steps, self.rate, self.first_order = steps, rate, first_order

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean error of four tasks after their inner steps."""
        return self.track(torch.stack([self._task() for _ in range(4)]).mean())

    def _task(self) -> Tensor:
        phase, x = torch.rand(()), 4 * torch.rand(40, 1) - 2
        y = (x + phase).sin()
        weights = dict(self.net.named_parameters())
        for _ in range(self.steps):
            loss = F.mse_loss(functional_call(self.net, weights, (x[:20],)), y[:20])
            slopes = torch.autograd.grad(
                loss, list(weights.values()), create_graph=not self.first_order
            )
            weights = {
                k: w - self.rate * g for (k, w), g in zip(weights.items(), slopes, strict=True)
            }
        return F.mse_loss(functional_call(self.net, weights, (x[20:],)), y[20:])


class TwoBackwards(Net):
    """Two backward passes through one graph, by ``retain_graph``."""

    def __init__(self) -> None:
        super().__init__(mlp(8, 9))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Projects the gradient of the second loss if it disagrees with that of the first."""
        x, y = batch
        output, optimizer = self.net(x), self.optimizers()
        main, extra = F.mse_loss(output[:, :1], y), F.mse_loss(output[:, 1:], x)
        optimizer.zero_grad()
        self.manual_backward(extra, retain_graph=True)
        second = [p.grad.clone() for p in self.parameters()]
        optimizer.zero_grad()
        self.manual_backward(main)
        self._add_projected(second)
        optimizer.step()
        self.track(main.detach() + extra.detach())

    @torch.no_grad()
    def _add_projected(self, second: list[Tensor]) -> None:
        for parameter, other in zip(self.parameters(), second, strict=True):
            agreement = (parameter.grad * other).sum() / parameter.grad.square().sum()
            parameter.grad.add_(other - agreement.clamp(max=0.0) * parameter.grad)


class Distilled(Net):
    """Imitates a larger teacher that is frozen and part of the module."""

    def __init__(self) -> None:
        super().__init__(mlp(8, 4, 32))
        self.teacher = mlp(8, 4, 128).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the divergence from the teacher's softened predictions."""
        x = batch[0]
        goal = (self.teacher(x) / 0.1).softmax(1)
        return self.track(F.kl_div(self.net(x).log_softmax(1), goal, reduction="batchmean"))


class Fold(Net):
    """Starts each fit from new weights, as cross-validation with one module does."""

    def on_fit_start(self) -> None:
        """Resets all layers."""
        for layer in self.net[::2]:
            layer.reset_parameters()


class Recomputed(Net):
    """Recomputes the activations of the body in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss, with a checkpoint in the middle."""
        x, y = batch
        h = checkpoint(self.net[:4], x, use_reentrant=False)
        return self.track(F.mse_loss(self.net[4](h), y))


class Streamed(IterableDataset[Any]):
    """Samples without a length, drawn on the fly."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(1, 8)
            yield x[0], surface(x)[0]


class TwoLoaders(Net):
    """Trains on batches of two loaders at a time."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the sum of both losses."""
        return self.track(sum(self.loss(self.net, part) for part in batch.values()))


def two_loaders(seed: int) -> CombinedLoader:
    """Returns a long and a short loader, the short one repeated."""
    return CombinedLoader(
        {"one": regression(seed), "other": regression(seed + 20, 320)}, "max_size_cycle"
    )


class Truncated(Net):
    """A recurrent network whose state is carried from batch to batch, detached."""

    state: Tensor | None = None
    latest: Tensor | float = 0.0

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.GRU(2, 24, batch_first=True), nn.Linear(24, 1)]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the error of one piece of an endless sequence."""
        x = torch.randn(16, 12, 2)
        y = leaky_sum(x, self.latest)
        self.latest = y[:, -1]
        output, state = self.net[0](x, self.state)
        self.state = state.detach()
        return self.track(F.mse_loss(self.net[1](output), y))


class StraightThrough(Net):
    """Rounds its activations, and lets gradients pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a network with rounded activations."""
        x, y = batch
        h = self.net[:4](x)
        rounded = h + ((4 * h).round() / 4 - h).detach()
        return self.track(F.mse_loss(self.net[4](rounded), y))


class Routed(Net):
    """A mixture of four experts, of which each sample uses one; some get no sample."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([mlp(8, 1, 16) for _ in range(4)]))
        self.router = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the error and the balance of the experts."""
        x, y = batch
        weights = self.router(x).softmax(1)
        chosen = weights.argmax(1)
        output = torch.zeros_like(y)
        for i, expert in enumerate(self.net):
            if (mine := chosen == i).any():
                output[mine] = expert(x[mine]) * weights[mine, i, None]
        load = F.one_hot(chosen, 4).float().mean(0)
        main = F.mse_loss(output, y)
        return self.track(main + 0.01 * 4 * (load * weights.mean(0)).sum(), main)


class PerSample(Net):
    """Clips the gradient of each sample and adds noise, as differential privacy does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Computes a gradient for each sample, and steps on their noisy mean."""
        x, y = batch
        weights = {k: v.detach() for k, v in self.net.named_parameters()}
        gradients = torch.func.vmap(torch.func.grad(self._one), in_dims=(None, 0, 0))(weights, x, y)
        norms = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
        shares = (1 / norms.clamp(min=1.0))[:, None]
        for name, parameter in self.net.named_parameters():
            mean = (gradients[name].flatten(1) * shares).mean(0).view_as(parameter)
            parameter.grad = mean + 0.003 * torch.randn_like(mean)
        self.optimizers().step()
        with torch.no_grad():
            self.track(self.loss(self.net, batch))

    def _one(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(self.net, weights, (x,)), y)


class Evolution(Net):
    """Estimates the gradient from losses at perturbed weights; there is no backward pass."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 1), optimizer=lambda p: torch.optim.SGD(p, 0.02))
        self.automatic_optimization = False

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Writes an estimate into the gradients, and steps."""
        weights = dict(self.net.named_parameters())
        self.track(self._error(weights, batch))
        estimates = {k: torch.zeros_like(w) for k, w in weights.items()}
        for _ in range(8):
            noise = {k: torch.randn_like(w) for k, w in weights.items()}
            up = self._error({k: w + 0.05 * noise[k] for k, w in weights.items()}, batch)
            down = self._error({k: w - 0.05 * noise[k] for k, w in weights.items()}, batch)
            for name in estimates:
                estimates[name] += (up - down) / 0.1 * noise[name] / 8
        for name, parameter in weights.items():
            parameter.grad = estimates[name]
        self.optimizers().step()

    def _error(self, weights: dict[str, Tensor], batch: Any) -> Tensor:
        return F.mse_loss(functional_call(self.net, weights, (batch[0],)), batch[1])


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.2, max_iter=4)


def strong_wolfe(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe")


def smooth(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=0.1)


def classifier(loss: Any = cross_entropy, dropout: float = 0.0, **options: Any) -> Net:
    return Net(normalised(dropout), loss=loss, **options)


def kind(name: str, practice: str, module: Any = Net, **options: Any) -> Kind:
    return Kind(name=name, group=LOOPS, practice=practice, module=module, **options)


def options(**values: Any) -> Any:
    """Returns a function that creates options of the Trainer."""
    return lambda: dict(values)


KINDS = (
    kind(
        "L-BFGS, full batch",
        "L-BFGS evaluates the closure several times in each step, on one batch.",
        partial(Net, optimizer=lbfgs),
        data=full_batch,
        steps=150,
    ),
    kind(
        "L-BFGS, full batch, line search",
        "L-BFGS with a strong Wolfe line search.",
        partial(Net, optimizer=strong_wolfe),
        data=full_batch,
        steps=150,
    ),
    kind(
        "4 batches accumulated",
        "Gradients of four batches are accumulated.",
        trainer=options(accumulate_grad_batches=4),
        steps=150,
    ),
    kind(
        "accumulation that grows",
        "The number of accumulated batches grows from 1 to 4 over the epochs.",
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 3: 4})],
        steps=150,
    ),
    kind("manual optimization", "One optimizer, stepped by hand.", ByHand),
    kind(
        "manual optimization, accumulated and clipped",
        "Gradients of four batches are accumulated and clipped by hand.",
        partial(ByHand, accumulate=4, clip=0.5),
        steps=150,
    ),
    kind(
        "two optimizers, one backward pass",
        "Two optimizers step by hand on one backward pass.",
        partial(TwoOptimizers, together=True),
        steps=400,
    ),
    kind(
        "two optimizers in turn",
        "The head steps in each batch, the body in every third, on passes of their own.",
        partial(TwoOptimizers, together=False, every=3),
        steps=300,
    ),
    kind(
        "training_step returns None at random",
        "`training_step` skips 10 % of the batches by returning None.",
        SometimesNone,
    ),
    kind(
        "training_step returns None every 7 batches",
        "`training_step` skips every seventh batch by returning None.",
        partial(SometimesNone, every=7),
    ),
    kind(
        "gradient noise in on_after_backward",
        "Annealed Gaussian noise is added to the gradients after each backward pass.",
        partial(NoisyGradients, before_step=False),
    ),
    kind(
        "gradient noise in on_before_optimizer_step",
        "Annealed Gaussian noise is added to the gradients before each update.",
        partial(NoisyGradients, before_step=True, optimizer=sgd),
    ),
    kind(
        "gradients changed by tensor hooks",
        "Tensor hooks centre the gradients of one layer and clamp those of another.",
        GradientHooks,
    ),
    kind(
        "clipped by norm",
        "Gradients are clipped to a norm of 0.1, far below the usual ones.",
        trainer=options(gradient_clip_val=0.1),
    ),
    kind(
        "clipped by value",
        "Gradients are clipped by value.",
        trainer=options(gradient_clip_val=0.05, gradient_clip_algorithm="value"),
    ),
    kind(
        "configure_gradient_clipping by norm",
        "The module overrides `configure_gradient_clipping`, and calls Lightning's method.",
        partial(OwnClipping, "norm"),
    ),
    kind(
        "configure_gradient_clipping, each tensor",
        "The module clips each tensor by its own norm.",
        partial(OwnClipping, "each", optimizer=sgd),
    ),
    kind(
        "configure_gradient_clipping by a quantile",
        "The module clips to the lower decile of the norms so far.",
        partial(OwnClipping, "quantile"),
    ),
    kind(
        "configure_gradient_clipping that does nothing",
        "The module switches the Trainer's clipping off.",
        partial(OwnClipping, "none"),
        trainer=options(gradient_clip_val=1.0),
    ),
    kind(
        "mixup",
        "Samples of a batch are mixed.",
        partial(Mixup, in_place=False),
        data=classes,
    ),
    kind(
        "mixup in place",
        "Samples of a batch are mixed, and written into the batch.",
        partial(Mixup, in_place=True),
        data=classes,
    ),
    kind(
        "noise written into the batch",
        "`on_train_batch_start` adds noise to the batch in place.",
        NoisyInputs,
    ),
    kind(
        "label smoothing",
        "The loss has label smoothing, and a floor well above zero.",
        partial(classifier, loss=smooth),
        data=classes,
    ),
    kind(
        "dropout of 0.5 and BatchNorm",
        "Half of the units are left out at random.",
        partial(classifier, dropout=0.5),
        data=classes,
    ),
    kind(
        "dropout and stochastic depth",
        "Residual blocks are left out at random; those have no gradients in that step.",
        StochasticDepth,
    ),
    kind("bf16-mixed", "Mixed precision in bfloat16.", trainer=options(precision="bf16-mixed")),
    kind(
        "bf16-true",
        "All weights are in bfloat16.",
        partial(Net, optimizer=sgd),
        trainer=options(precision="bf16-true"),
    ),
    kind("64-true", "All weights are in float64.", trainer=options(precision="64-true")),
    kind(
        "fp16 with a loss scale",
        "Mixed precision in float16, with a loss scale that grows every 50 steps.",
        trainer=fp16,
    ),
    kind(
        "fp16 with a loss scale, clipped",
        "The same with clipping, SGD and a classification with BatchNorm.",
        partial(classifier, optimizer=sgd),
        data=classes,
        trainer=lambda: fp16() | {"gradient_clip_val": 1.0},
    ),
    kind(
        "sharpness-aware, by hand",
        "Two backward passes in a step: at the weights, and at a worse point nearby.",
        TwoPasses,
    ),
    kind(
        "sharpness-aware, in optimizer_step",
        "The closure is evaluated twice in `optimizer_step`, the second time elsewhere.",
        TwoPassesInOptimizerStep,
    ),
    kind(
        "meta-learning",
        "An inner gradient step by `functional_call`, with second derivatives.",
        Meta,
        steps=150,
    ),
    kind(
        "meta-learning, three inner steps, first order",
        "Three inner gradient steps without second derivatives.",
        partial(Meta, steps=3, rate=0.01, first_order=True),
        steps=150,
    ),
    kind(
        "two backward passes through one graph",
        "`retain_graph` keeps a graph for a second backward pass; gradients are projected.",
        TwoBackwards,
    ),
    kind(
        "distillation with a frozen teacher",
        "A small network imitates a frozen one that is part of the module.",
        Distilled,
    ),
    kind(
        "three folds with one module and one list of callbacks",
        "One module, reset in between, and one list of callbacks serve three Trainers.",
        Fold,
        fits=3,
        steps=150,
    ),
    kind(
        "activations recomputed",
        "`torch.utils.checkpoint` recomputes the activations in the backward pass.",
        Recomputed,
    ),
    kind(
        "endless stream of samples",
        "An iterable data set without a length draws its samples from the global generator.",
        data=lambda seed: DataLoader(Streamed(), 32),
    ),
    kind(
        "two loaders at a time",
        "Each step trains on a batch of each of two loaders.",
        TwoLoaders,
        data=two_loaders,
    ),
    kind(
        "state carried from batch to batch",
        "A recurrent network's state is carried over, detached, in an attribute.",
        Truncated,
    ),
    kind(
        "straight-through rounding",
        "Activations are rounded, and gradients pass as if they were not.",
        StraightThrough,
    ),
    kind(
        "mixture of experts",
        "Each sample uses one of four experts; an expert without samples has no gradient.",
        Routed,
        steps=400,
    ),
    kind(
        "gradients clipped sample by sample, with noise",
        "Each sample's gradient is clipped and noise is added, as for differential privacy.",
        PerSample,
    ),
    kind(
        "evolution strategy",
        "Gradients are estimated from losses, without a backward pass.",
        Evolution,
        data=linear_task,
        steps=400,
    ),
    kind(
        "validation every 20 steps",
        "Validation runs every 20 steps, within the epoch.",
        held_out=regression,
        trainer=options(val_check_interval=20, check_val_every_n_epoch=None),
    ),
    kind(
        "batches of 2",
        "Batches of two samples have very different gradients.",
        partial(Net, optimizer=adam),
        data=lambda seed: loader(inputs(seed, 800), surface(inputs(seed, 800)), batch=2),
        steps=400,
    ),
    kind(
        "checkpoints and early stopping",
        "Checkpoints are saved and early stopping waits, both by the validation loss.",
        held_out=regression,
        trainer=options(enable_checkpointing=True),
        callbacks=lambda: [
            ModelCheckpoint(monitor="val_loss", save_last=True),
            EarlyStopping("val_loss", patience=20),
        ],
    ),
    kind(
        "loaders made again each epoch",
        "The Trainer makes the loader again at the start of each epoch.",
        trainer=options(reload_dataloaders_every_n_epochs=1),
    ),
    kind(
        "epochs of three batches",
        "Epochs are very short, so that each hook of an epoch is called all the time.",
        trainer=options(limit_train_batches=3),
    ),
)
