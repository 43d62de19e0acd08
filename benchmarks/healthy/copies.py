"""Kinds with a second copy of the weights: targets, averages, slow weights, recalibration.

Imports Lightning and torch.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.healthy.kind import WRITES, Kind
from benchmarks.healthy.networks import (
    Net,
    WriteCallback,
    Writing,
    adamw,
    inputs,
    loader,
    mlp,
    regression,
    sgd,
    surface,
)


class WithTarget(Writing):
    """Learns values by temporal differences from a slow copy of its network.

    Args:
        in_optimizer: The optimizer holds the copy too, as `self.parameters()` does.
        frozen: The copy has ``requires_grad=False``.
        **options: See `Writing`.
    """

    def __init__(self, in_optimizer: bool, frozen: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.target = deepcopy(self.net).requires_grad_(not frozen)
        self.in_optimizer = in_optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the error against reward and discounted target of the next state."""
        self._write_if_due("training_step", self.global_step)
        x, reward, following = batch
        with torch.no_grad():
            goal = reward + 0.7 * self.target(following)
        return self.track(F.mse_loss(self.net(x), goal))

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, with or without the copy."""
        return self.make_optimizer((self if self.in_optimizer else self.net).parameters())


def polyak(module: WithTarget, share: float) -> None:
    """Moves the copy by a share of its distance to the network."""
    with torch.no_grad():
        for slow, fast in zip(module.target.parameters(), module.net.parameters(), strict=True):
            slow.lerp_(fast, share)


def hard_copy(module: WithTarget) -> None:
    module.target.load_state_dict(module.net.state_dict())


def transitions(seed: int) -> Any:
    """Returns states, rewards and following states."""
    x, following = inputs(seed, 1600), inputs(seed + 9, 1600)
    return loader(x, surface(x), 0.5 * x + 0.5 * following)


class SelfSupervised(Writing):
    """Predicts its own moving average on another view of the batch, as BYOL does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(net=mlp(8, 8), **options)
        self.target, self.predictor = deepcopy(self.net).requires_grad_(False), nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative cosine of two noisy views."""
        x = batch[0]
        one, other = (x + 0.2 * torch.randn_like(x) for _ in range(2))
        with torch.no_grad():
            goal = self.target(other)
        cosine = F.cosine_similarity(self.predictor(self.net(one)), goal)
        return self.track(-cosine.mean())


class Lookahead(Writing):
    """Keeps slow weights, and goes back to them in part every few steps."""

    def on_fit_start(self) -> None:
        """Copies the slow weights."""
        self.slow = [p.detach().clone() for p in self.net.parameters()]


@torch.no_grad()
def synchronise(module: Lookahead, share: float = 0.5) -> None:
    for slow, fast in zip(module.slow, module.net.parameters(), strict=True):
        slow.lerp_(fast, share)
        fast.copy_(slow)


class SlowMomentum(Lookahead):
    """Reptile and federated averaging: several local models are averaged into the global one."""

    def on_fit_start(self) -> None:
        """Copies the global weights."""
        super().on_fit_start()
        self.sums = [torch.zeros_like(p) for p in self.slow]
        self.turns = 0


@torch.no_grad()
def end_of_client(module: SlowMomentum, clients: int) -> None:
    """Starts the next client from the global weights, or averages after the last."""
    module.turns += 1
    weights = list(module.net.parameters())
    for total, weight in zip(module.sums, weights, strict=True):
        total.add_(weight)
    for slow, total, weight in zip(module.slow, module.sums, weights, strict=True):
        if module.turns % clients == 0:
            slow.copy_(total / clients)
            total.zero_()
        weight.copy_(slow)


class AverageForValidation(Callback):
    """Keeps a moving average of the weights, and swaps it in for each validation."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the weights."""
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Moves the average."""
        for average, parameter in zip(self.average, pl_module.parameters(), strict=True):
            average.lerp_(parameter, 0.05)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the average in."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swaps the weights back in."""
        self._swap(pl_module)

    def _swap(self, pl_module: LightningModule) -> None:
        for i, parameter in enumerate(pl_module.parameters()):
            parameter.data, self.average[i] = self.average[i], parameter.data


def normalised(momentum: float | None = 0.1) -> nn.Sequential:
    """Returns a network with BatchNorm."""
    norm = nn.BatchNorm1d(64, momentum=momentum)
    return nn.Sequential(nn.Linear(8, 64), norm, nn.ReLU(), nn.Linear(64, 1))


class Recalibrated(Writing):
    """Computes the running statistics of BatchNorm again, from fresh batches."""


@torch.no_grad()
def recalibrate(module: Net) -> None:
    module.net[1].reset_running_stats()
    for _ in range(20):
        module.net(torch.randn(32, 8))


def set_statistics(module: Net) -> None:
    """Sets the running statistics to exact ones."""
    hidden = module.net[0](torch.randn(512, 8)).detach()
    module.net[1].running_mean.copy_(hidden.mean(0))
    module.net[1].running_var.copy_(hidden.var(0))


def epochs() -> dict[str, Any]:
    """Returns Trainer options of a run that is measured in epochs."""
    return {"max_epochs": 5, "max_steps": -1}


def kind(name: str, practice: str, module: Any = Net, **options: Any) -> Kind:
    return Kind(name=name, group=WRITES, practice=practice, module=module, **options)


KINDS = (
    kind(
        "target network moved each step, in no optimizer",
        "A target network follows by 2 % each step; no optimizer holds it.",
        partial(WithTarget, False, write=partial(polyak, share=0.02)),
        data=transitions,
    ),
    kind(
        "target network moved each step, in the optimizer",
        "A frozen target network follows by 5 % each step; `self.parameters()` includes it.",
        partial(WithTarget, True, write=partial(polyak, share=0.05), hook="optimizer_step"),
        data=transitions,
    ),
    kind(
        "target network copied every 60 steps, callback",
        "A callback copies the network into its target every 60 steps by `load_state_dict`.",
        partial(WithTarget, False),
        data=transitions,
        callbacks=lambda: [WriteCallback(hard_copy, every=60)],
    ),
    kind(
        "target network copied every 50 steps, in the optimizer",
        "A target that the optimizer holds, without gradient, is overwritten every 50 steps.",
        partial(WithTarget, True, frozen=False, write=hard_copy, hook="training_step", every=50),
        data=transitions,
    ),
    kind(
        "momentum teacher of a self-supervised loss",
        "A frozen moving average of the encoder is the goal of the student, as in BYOL.",
        partial(SelfSupervised, write=partial(polyak, share=0.02)),
    ),
    kind(
        "lookahead every 5 steps, module hook",
        "Every 5 steps the weights go half the way back to slow weights.",
        partial(Lookahead, write=synchronise, every=5),
    ),
    kind(
        "lookahead every 20 steps, optimizer_step, SGD",
        "Every 20 steps the weights go 80 % of the way back to slow weights.",
        partial(
            Lookahead,
            write=partial(synchronise, share=0.2),
            hook="optimizer_step",
            every=20,
            optimizer=sgd,
        ),
        steps=300,
    ),
    kind(
        "federated averaging, client changes every 10 steps",
        "Four clients train in turn for 10 steps each from the global weights, then are averaged.",
        partial(SlowMomentum, write=partial(end_of_client, clients=4), every=10),
        steps=400,
    ),
    kind(
        "federated averaging, one client each epoch",
        "Each epoch trains a client from the global weights; two are averaged.",
        partial(SlowMomentum, write=partial(end_of_client, clients=2), hook="on_train_epoch_end"),
        steps=400,
    ),
    kind(
        "StochasticWeightAveraging callback",
        "Lightning's callback averages the last epochs at a higher learning rate.",
        trainer=epochs,
        callbacks=lambda: [StochasticWeightAveraging(5e-3, swa_epoch_start=2)],
    ),
    kind(
        "StochasticWeightAveraging callback, BatchNorm",
        "The callback averages the weights, and recomputes BatchNorm's statistics at the end.",
        lambda: Net(normalised()),
        trainer=epochs,
        callbacks=lambda: [
            StochasticWeightAveraging(1e-2, swa_epoch_start=0.5, annealing_epochs=2)
        ],
    ),
    kind(
        "EMAWeightAveraging callback",
        "Lightning's callback keeps a moving average, and uses it in validation and at the end.",
        callbacks=lambda: [EMAWeightAveraging(decay=0.95)],
        held_out=regression,
    ),
    kind(
        "average swapped in for validation by hand",
        "A callback swaps a moving average of the weights in for each validation, and out again.",
        callbacks=lambda: [AverageForValidation()],
        held_out=regression,
    ),
    kind(
        "BatchNorm recalibrated each epoch",
        "BatchNorm's statistics are reset and recomputed from 20 batches at the end of each epoch.",
        lambda: Recalibrated(recalibrate, "on_train_epoch_end", net=normalised(momentum=None)),
    ),
    kind(
        "BatchNorm statistics set every 30 steps, callback",
        "A callback sets BatchNorm's statistics to exact ones every 30 steps.",
        lambda: Net(normalised(), optimizer=adamw),
        callbacks=lambda: [WriteCallback(set_statistics, every=30)],
    ),
)
