"""Kinds that change what is trained: freezing, unfreezing, growing.

Imports Lightning and torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn

from benchmarks.healthy.kind import WRITES, Kind
from benchmarks.healthy.networks import Net, Writing, adam, mlp, sgd


def freeze_body(module: Net) -> None:
    module.net[:4].requires_grad_(False)


def unfreeze_body(module: Net) -> None:
    module.net[:4].requires_grad_(True)


def toggle_hidden_layer(module: Net) -> None:
    layer = module.net[2]
    layer.requires_grad_(not layer.weight.requires_grad)


def train_one_layer_in_turn(module: Net) -> None:
    """Trains the next of the three layers, and freezes the others."""
    turn = module.current_epoch % 3
    for i in range(3):
        module.net[2 * i].requires_grad_(i == turn)


class FrozenAtFirst(Writing):
    """Begins with a frozen body, and the optimizer holds all parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        freeze_body(self)


class GroupAdded(FrozenAtFirst):
    """The optimizer holds the head; the body is added as a second group."""

    def configure_optimizers(self) -> Any:
        """Returns the optimizer of the head."""
        return self.make_optimizer(self.net[4].parameters())


def add_body(module: GroupAdded) -> None:
    """Adds the body to the optimizer, once, with a smaller learning rate."""
    optimizer = module.optimizers().optimizer
    if len(optimizer.param_groups) == 1:
        unfreeze_body(module)
        optimizer.add_param_group({"params": list(module.net[:4].parameters()), "lr": 1e-3})


class Growing(Writing):
    """Adds a residual block at a time, whose output begins at zero."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.blocks = nn.ModuleList()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of the network with its blocks."""
        x, y = batch
        h = self.net[:4](x)
        for block in self.blocks:
            h = h + block(h)
        return self.track(nn.functional.mse_loss(self.net[4](h), y))


def grow(module: Growing) -> None:
    """Adds a block to the network and to the optimizer; at most two."""
    if len(module.blocks) < 2:
        block = mlp(64, 64)
        nn.init.zeros_(block[4].weight)
        module.blocks.append(block)
        group = {"params": list(block.parameters()), "lr": 1e-3}
        module.optimizers().optimizer.add_param_group(group)


class Widening(Writing):
    """Has spare units that a mask switches on in stages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("mask", (torch.arange(64) < 16).float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of the network with the units that are on."""
        x, y = batch
        return self.track(nn.functional.mse_loss(self.net[4](self.net[:4](x) * self.mask), y))


def widen(module: Widening) -> None:
    module.mask[: int(module.mask.sum()) + 16] = 1.0


class UnfreezeInSecondEpoch(BaseFinetuning):
    """Trains the head in the first epoch, then all layers."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freezes the body."""
        self.freeze(pl_module.net[:4])

    def finetune_function(
        self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Unfreezes the body in the second epoch."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:4], optimizer)


class PretrainedBody(Net):
    """A frozen body, and a new head that alone is in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        freeze_body(self)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer of the head."""
        return adam(p for p in self.parameters() if p.requires_grad)


class DiscriminativeRates(Net):
    """A new head on a pretrained body, with a learning rate for each layer."""

    def configure_optimizers(self) -> Any:
        """Returns an optimizer with three groups."""
        rates = zip((0, 2, 4), (1e-4, 1e-3, 1e-2), strict=True)
        return adam([{"params": self.net[i].parameters(), "lr": rate} for i, rate in rates])


class LowRankAdapter(Net):
    """A frozen layer with a low-rank correction that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        freeze_body(self)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
        nn.init.zeros_(self.up.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of the corrected network."""
        x, y = batch
        h = self.net[:2](x)
        h = (self.net[2](h) + self.up(self.down(h))).relu()
        return self.track(nn.functional.mse_loss(self.net[4](h), y))


def kind(name: str, practice: str, module: Any, **options: Any) -> Kind:
    return Kind(name=name, group=WRITES, practice=practice, module=module, **options)


KINDS = (
    kind(
        "body frozen after 100 steps by requires_grad",
        "All layers but the last are frozen by `requires_grad` after 100 steps.",
        partial(Writing, freeze_body, every=100),
    ),
    kind(
        "body unfrozen after 100 steps by requires_grad",
        "Only the head trains at first; the optimizer holds all parameters from the start.",
        partial(FrozenAtFirst, write=unfreeze_body, every=100),
    ),
    kind(
        "one layer frozen and unfrozen every 20 steps",
        "The hidden layer is frozen and unfrozen in turn every 20 steps, in `training_step`.",
        partial(Writing, toggle_hidden_layer, "training_step", every=20, optimizer=sgd),
    ),
    kind(
        "layers trained in turn, one each epoch",
        "One of three layers trains in each epoch, the others are frozen.",
        partial(Writing, train_one_layer_in_turn, "on_train_epoch_end"),
    ),
    kind(
        "parameter group added after 60 steps",
        "The body is unfrozen and added to the optimizer as a second group.",
        partial(GroupAdded, write=add_body, every=60),
    ),
    kind(
        "parameter group added after an epoch",
        "The body is unfrozen and added to the optimizer at the end of the first epoch.",
        partial(GroupAdded, write=add_body, hook="on_train_epoch_end", optimizer=sgd),
    ),
    kind(
        "blocks grown every 70 steps",
        "A new residual block and its parameter group are added every 70 steps.",
        partial(Growing, write=grow, every=70),
    ),
    kind(
        "units switched on every 50 steps",
        "A mask switches 16 more hidden units on every 50 steps.",
        partial(Widening, write=widen, every=50),
    ),
    kind(
        "BaseFinetuning callback",
        "Lightning's `BaseFinetuning` unfreezes the body in the second epoch.",
        Net,
        callbacks=lambda: [UnfreezeInSecondEpoch()],
    ),
    kind(
        "new head on a frozen body",
        "A new head trains on a frozen body, whose parameters are in no optimizer.",
        PretrainedBody,
    ),
    kind(
        "learning rate per layer",
        "Three layers have learning rates a factor of 100 apart.",
        DiscriminativeRates,
    ),
    kind(
        "low-rank adapter on a frozen layer",
        "A frozen layer is corrected by a product of two small matrices, one of which begins at 0.",
        LowRankAdapter,
    ),
)
