"""Kinds that write the weights of layers on purpose, outside the optimizer.

Imports Lightning and torch.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from benchmarks.healthy.kind import WRITES, Kind
from benchmarks.healthy.networks import Net, WriteCallback, Writing, adam, adamw, mlp, sgd

Write = Callable[[Any], None]


def reset_by_method(module: Net) -> None:
    module.net[4].reset_parameters()


def reset_by_init(module: Net) -> None:
    nn.init.xavier_uniform_(module.net[4].weight)
    nn.init.zeros_(module.net[4].bias)


def reset_by_state_dict(module: Net) -> None:
    module.net[4].load_state_dict(nn.Linear(64, 1).state_dict())


def reset_with_moments(module: Net) -> None:
    """Resets the last layer and the state that the optimizer keeps of it."""
    module.net[4].reset_parameters()
    for parameter in module.net[4].parameters():
        module.optimizers().optimizer.state.pop(parameter, None)


def reset_last_two(module: Net) -> None:
    module.net[2].reset_parameters()
    module.net[4].reset_parameters()


def least_active(module: Net, count: int) -> Tensor:
    """Returns the indices of the hidden units with the smallest mean activation."""
    with torch.no_grad():
        return module.net[:4](torch.randn(128, 8)).mean(0).argsort()[:count]


def recycle_units(module: Net, count: int = 8) -> None:
    """Re-initialises the least active units: incoming weights drawn, outgoing weights zero."""
    units, fresh = least_active(module, count), nn.Linear(64, 64)
    with torch.no_grad():
        module.net[2].weight[units] = fresh.weight[units]
        module.net[2].bias[units] = fresh.bias[units]
        module.net[4].weight[:, units] = 0.0


def recycle_units_by_data(module: Net) -> None:
    """Does the same through ``parameter.data``, with outgoing weights that are drawn too."""
    units, fresh, last = least_active(module, 16), nn.Linear(64, 64), nn.Linear(64, 1)
    module.net[2].weight.data[units] = fresh.weight.data[units]
    module.net[4].weight.data[:, units] = last.weight.data[:, units]


def shrink_and_perturb(module: Net, shrink: float = 0.6, noise: float = 0.02) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(shrink).add_(noise * torch.randn_like(parameter))


def clamp(module: Net, limit: float) -> None:
    for parameter in module.parameters():
        parameter.data.clamp_(-limit, limit)


def clamp_out_of_place(module: Net, limit: float = 0.15) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.clamp(-limit, limit)


def unit_rows(module: Net, radius: float = 1.0) -> None:
    """Projects the rows of the hidden layer to a sphere."""
    with torch.no_grad():
        weight = module.net[2].weight
        weight.copy_(radius * F.normalize(weight, dim=1))


def unit_rows_of_all(module: Net) -> None:
    for layer in (module.net[0], module.net[2]):
        layer.weight.data = F.normalize(layer.weight.data, dim=1)


def prune_smallest(module: Net, share: float = 0.5) -> None:
    """Sets the smallest weights of the hidden layer to zero."""
    weight = module.net[2].weight.data
    weight[weight.abs() < weight.abs().quantile(share)] = 0.0


def prune_with_masks(module: Net) -> None:
    """Prunes 20 % of the remaining weights by `torch.nn.utils.prune`, which keeps masks."""
    for layer in (module.net[0], module.net[2]):
        prune.l1_unstructured(layer, "weight", amount=0.2)


def prune_for_good(module: Net) -> None:
    """Prunes and removes the mask at once: the weights are zero, and may grow again."""
    prune.ln_structured(module.net[2], "weight", amount=0.25, n=2, dim=0)
    prune.remove(module.net[2], "weight")


def add_noise(module: Net, scale: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def decay(module: Net, rate: float = 0.001) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 - rate)


def divide_by_spectral_norm(module: Net) -> None:
    with torch.no_grad():
        weight = module.net[2].weight
        weight.div_(torch.linalg.matrix_norm(weight, 2).clamp(min=1.0))


def round_to_grid(module: Net, grid: float = 1 / 64) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((parameter / grid).round() * grid)


def project_to_positive(module: Net) -> None:
    """Keeps the last layer non-negative, as in monotone networks and matrix factorisation."""
    module.net[4].weight.data.clamp_(min=0.0)


def standardise_rows(module: Net) -> None:
    with torch.no_grad():
        weight = module.net[2].weight
        weight.sub_(weight.mean(1, keepdim=True)).div_(weight.std(1, keepdim=True) * 8)


def set_hidden_bias(module: Net) -> None:
    nn.init.constant_(module.net[2].bias, 0.1)


def permute_units(module: Net) -> None:
    """Permutes hidden units, which leaves the function of the network as it is."""
    order = torch.randperm(64)
    with torch.no_grad():
        for tensor in (module.net[2].weight, module.net[2].bias):
            tensor.copy_(tensor[order])
        module.net[4].weight.copy_(module.net[4].weight[:, order])


def equalise(module: Net, factor: float = 4.0) -> None:
    """Moves a scale from one layer to the next, which leaves the function as it is."""
    for tensor in (module.net[2].weight, module.net[2].bias):
        tensor.data.mul_(factor)
    module.net[4].weight.data.div_(factor)


def clear_moments(module: Net) -> None:
    module.optimizers().optimizer.state.clear()


def imprint(module: Net) -> None:
    """Starts one unit again from the mean of all others, as for a new word or class."""
    unit = int(torch.randint(64, ()))
    with torch.no_grad():
        module.net[2].weight[unit] = module.net[2].weight.mean(0)
        module.net[4].weight[:, unit] = module.net[4].weight.mean()


def replace_optimizer(module: Net) -> None:
    """Goes on with SGD instead of Adam."""
    module.trainer.optimizers = [sgd(module.parameters())]


class Tied(Writing):
    """An autoencoder whose decoder is a copy of its transposed encoder after each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(net=nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 8)]), **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the reconstruction error."""
        self._write_if_due("training_step", self.global_step)
        x = batch[0]
        return self.track(F.mse_loss(self.net[1](self.net[0](x)), x))


def tie(module: Tied) -> None:
    module.net[1].weight.data.copy_(module.net[0].weight.data.t())


class Binarised(Net):
    """Runs forward and backward with the signs of its weights, and updates the real ones."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Replaces the hidden weights by their scaled signs for this pass."""
        weight = self.net[2].weight
        self.real = weight.data.clone()
        weight.data = weight.data.sign() * weight.data.abs().mean()
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Puts the real weights in place before the update."""
        self.net[2].weight.data = self.real


class DataDependentInit(Net):
    """Scales each layer by the statistics of the first batch, in ``training_step``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Scales the layers in the first step."""
        if self.global_step == 0:
            self._scale(batch[0])
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def _scale(self, x: Tensor) -> None:
        for layer in self.net:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                layer.weight.div_(x.std())
                x = x / x.std()


class Best(Writing):
    """Returns to its best weights so far every so often."""

    best, lowest = None, float("inf")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keeps the weights of the smallest loss."""
        loss = super().training_step(batch, batch_idx)
        if float(loss) < self.lowest:
            self.lowest, self.best = float(loss), deepcopy(self.net.state_dict())
        return loss


def load_best(module: Best) -> None:
    module.net.load_state_dict(module.best)


class Rewound(Writing):
    """Prunes by magnitude and goes back to its initial weights, as lottery tickets do."""

    def on_fit_start(self) -> None:
        """Keeps the initial weights."""
        self.initial = deepcopy(self.net.state_dict())


def rewind(module: Rewound) -> None:
    mask = module.net[2].weight.abs() > module.net[2].weight.abs().quantile(0.3)
    module.net.load_state_dict(module.initial)
    module.net[2].weight.data.mul_(mask)


class Embedded(Net):
    """Classifies words by embeddings that the forward pass renormalises in place."""

    def __init__(self) -> None:
        embedding = nn.Embedding(50, 16, max_norm=1.0)
        super().__init__(net=nn.Sequential(embedding, nn.Flatten(), nn.Linear(80, 4)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Classifies a sentence by its first word, modulo the number of classes."""
        # The words are drawn here: the data of other kinds are only used for their number.
        words = torch.randint(50, (32, 5))
        return self.track(F.cross_entropy(self.net(words), words[:, 0] % 4))


def writing(
    name: str, practice: str, write: Write, hook: str = "", every: int = 1, **options: Any
) -> Kind:
    """Creates a kind that writes the weights of a regression network.

    Args:
        name: Of the kind.
        practice: What users do, in one sentence.
        write: Writes into the module.
        hook: See `Writing`; "callback" and "callback, epoch" write from a callback.
        every: See `Writing`.
        **options: ``steps`` and ``callbacks`` of the kind; the rest are options of the module.
    """
    module = options.pop("module", Writing)
    kind = {key: options.pop(key) for key in ("steps", "data", "trainer") if key in options}
    if hook.startswith("callback"):

        def callbacks() -> list[Callback]:
            return [WriteCallback(write, every, each_epoch=hook.endswith("epoch"))]

        kind["callbacks"] = callbacks
    else:
        options |= {"write": write, "hook": hook or "on_train_batch_end", "every": every}
    fresh = options.pop("net", mlp)
    if module is Writing:
        create = lambda: module(net=fresh(), **options)  # noqa: E731
    else:
        create = partial(module, **options)
    return Kind(name=name, group=WRITES, practice=practice, module=create, **kind)


RESETS = (
    writing(
        "last layer reset every 100 steps, module hook",
        "The last layer is reset every 100 steps by `reset_parameters` in `on_train_batch_end`, "
        "against primacy bias in reinforcement learning.",
        reset_by_method,
        every=100,
        steps=290,
    ),
    writing(
        "last layer reset every 50 steps, callback, nn.init",
        "A callback re-initialises the last layer by `nn.init` every 50 steps.",
        reset_by_init,
        "callback",
        every=50,
    ),
    writing(
        "last layer reset each epoch, load_state_dict",
        "The last layer is loaded from the state of a new one at the end of each epoch, as in "
        "iterated learning.",
        reset_by_state_dict,
        "on_train_epoch_end",
        steps=245,
    ),
    writing(
        "last layer and its moments reset every 80 steps, training_step",
        "The last layer and its optimizer state are reset at the start of `training_step`.",
        reset_with_moments,
        "training_step",
        every=80,
        optimizer=adamw,
    ),
    writing(
        "last two layers reset every 100 steps, optimizer_step, SGD",
        "Two of three layers are reset in `optimizer_step`, after the update.",
        reset_last_two,
        "optimizer_step",
        every=100,
        steps=290,
        optimizer=sgd,
    ),
    writing(
        "dormant units every 40 steps, module hook",
        "The least active units are re-initialised every 40 steps, with outgoing weights of zero.",
        recycle_units,
        every=40,
    ),
    writing(
        "dormant units every 25 steps, training_step, .data",
        "A quarter of the units is redrawn through `.data` in `training_step`.",
        recycle_units_by_data,
        "training_step",
        every=25,
    ),
    writing(
        "dormant units each epoch, callback",
        "A callback re-initialises the least active units at the end of each epoch.",
        partial(recycle_units, count=16),
        "callback, epoch",
    ),
    writing(
        "shrink and perturb each epoch",
        "All weights are multiplied by 0.6 and noise is added at the end of each epoch, before new "
        "data arrive.",
        shrink_and_perturb,
        "on_train_epoch_end",
        steps=245,
    ),
    writing(
        "shrink and perturb every 70 steps, optimizer_step",
        "All weights are halved and noise is added every 70 steps, after the update.",
        partial(shrink_and_perturb, shrink=0.5, noise=0.05),
        "optimizer_step",
        every=70,
    ),
    Kind(
        name="best weights reloaded every 60 steps",
        group=WRITES,
        practice="The best weights so far are loaded again every 60 steps.",
        module=lambda: Best(write=load_best, every=60),
    ),
    Kind(
        name="lottery ticket rewound every 100 steps",
        group=WRITES,
        practice="Small weights are pruned and the others go back to their initial values.",
        module=lambda: Rewound(write=rewind, every=100),
        steps=290,
    ),
)

PROJECTIONS = (
    writing(
        "weights clamped each step, optimizer_step, .data",
        "All weights are clamped to 0.2 after each update, as for a Wasserstein critic.",
        partial(clamp, limit=0.2),
        "optimizer_step",
    ),
    writing(
        "weights clamped each step, callback, SGD",
        "A callback clamps all weights to 0.3 at the end of each batch.",
        partial(clamp, limit=0.3),
        "callback",
        optimizer=sgd,
    ),
    writing(
        "weights clamped every 20 steps, new storage",
        "`parameter.data` is replaced by a clamped copy every 20 steps.",
        clamp_out_of_place,
        every=20,
    ),
    writing(
        "rows projected to unit norm each step, module hook",
        "The rows of a layer are normalised in place at the end of each batch.",
        unit_rows,
    ),
    writing(
        "rows projected to unit norm each step, optimizer_step, .data",
        "The rows of two layers are normalised through `.data` after each update.",
        unit_rows_of_all,
        "optimizer_step",
    ),
    writing(
        "rows projected to unit norm each step, training_step",
        "The rows of a layer are normalised before each forward pass.",
        unit_rows,
        "training_step",
        optimizer=adamw,
    ),
    writing(
        "rows projected to norm 3 each epoch",
        "The rows of a layer are projected to a large sphere at the end of each epoch.",
        partial(unit_rows, radius=3.0),
        "on_train_epoch_end",
    ),
    writing(
        "rows projected to unit norm each epoch, callback",
        "A callback projects the rows of a layer to unit norm at the end of each epoch.",
        unit_rows,
        "callback, epoch",
    ),
    writing(
        "rows standardised every 30 steps",
        "The rows of a layer are shifted and scaled to a fixed mean and deviation every 30 steps.",
        standardise_rows,
        every=30,
    ),
    writing(
        "last layer kept non-negative",
        "Negative weights of the last layer are set to zero after each step.",
        project_to_positive,
    ),
    writing(
        "divided by spectral norm every 20 steps",
        "A layer is divided by its largest singular value every 20 steps.",
        divide_by_spectral_norm,
        every=20,
    ),
    Kind(
        name="embedding with max_norm",
        group=WRITES,
        practice="`nn.Embedding(max_norm=1)` renormalises rows in the forward pass.",
        module=Embedded,
    ),
    Kind(
        name="spectral norm by parametrization",
        group=WRITES,
        practice="A layer has a spectral norm, whose vectors are updated in the forward pass.",
        module=lambda: Net(_with(parametrizations.spectral_norm)),
    ),
    Kind(
        name="spectral norm by hooks",
        group=WRITES,
        practice="A layer has the older `torch.nn.utils.spectral_norm`.",
        module=lambda: Net(_with(nn.utils.spectral_norm)),
    ),
    Kind(
        name="weight norm by parametrization",
        group=WRITES,
        practice="A layer is split into direction and length.",
        module=lambda: Net(_with(parametrizations.weight_norm)),
    ),
    Kind(
        name="orthogonal by parametrization",
        group=WRITES,
        practice="A layer is kept orthogonal by `torch.nn.utils.parametrizations.orthogonal`.",
        module=lambda: Net(_with(parametrizations.orthogonal)),
        steps=150,
    ),
)


def _with(parametrization: Callable[[nn.Linear], Any]) -> nn.Sequential:
    """Returns an `mlp` with a parametrization of its hidden layer."""
    net = mlp()
    parametrization(net[2])
    return net


OTHERS = (
    writing(
        "magnitude pruning each epoch, .data",
        "Half of the weights of a layer, the smallest, are set to zero at the end of each epoch.",
        prune_smallest,
        "on_train_epoch_end",
    ),
    writing(
        "magnitude pruning each epoch, masks",
        "20 % of the remaining weights are pruned each epoch by `torch.nn.utils.prune`.",
        prune_with_masks,
        "on_train_epoch_end",
    ),
    writing(
        "structured pruning every 60 steps, mask removed",
        "A quarter of the rows of a layer is set to zero every 60 steps.",
        prune_for_good,
        "callback",
        every=60,
    ),
    writing(
        "pruned weights set to zero each step",
        "The smallest 30 % of the weights of a layer are set to zero after each update.",
        partial(prune_smallest, share=0.3),
        "optimizer_step",
    ),
    Kind(
        name="ModelPruning callback",
        group=WRITES,
        practice="Lightning's `ModelPruning` prunes 20 % of the weights each epoch.",
        module=Net,
        callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.2, verbose=0)],
    ),
    writing(
        "Langevin noise on weights, module hook",
        "Gaussian noise is added to all weights after each step, as in SGLD.",
        partial(add_noise, scale=1e-3),
    ),
    writing(
        "Langevin noise on weights, optimizer_step, SGD",
        "Larger Gaussian noise is added to all weights in `optimizer_step`, with plain SGD.",
        partial(add_noise, scale=5e-3),
        "optimizer_step",
        optimizer=sgd,
    ),
    writing(
        "noise on weights every 60 steps, callback",
        "A callback perturbs all weights strongly every 60 steps, to leave a flat region.",
        partial(add_noise, scale=0.1),
        "callback",
        every=60,
    ),
    writing(
        "weight decay by hand",
        "All weights are multiplied by 0.999 after each step.",
        decay,
        "optimizer_step",
    ),
    writing(
        "weights rounded to a grid each epoch",
        "All weights are rounded to multiples of 1/64 at the end of each epoch.",
        round_to_grid,
        "on_train_epoch_end",
    ),
    writing(
        "weights rounded to a grid every 10 steps",
        "All weights are rounded to multiples of 1/256 every 10 steps.",
        partial(round_to_grid, grid=1 / 256),
        every=10,
    ),
    writing(
        "bias set to a constant every 30 steps",
        "The bias of a layer is set to 0.1 every 30 steps by `nn.init.constant_`.",
        set_hidden_bias,
        every=30,
    ),
    writing(
        "hidden units permuted every 50 steps",
        "Hidden units are permuted, with their weights in the next layer.",
        permute_units,
        every=50,
    ),
    writing(
        "scale moved between layers each epoch",
        "A layer is multiplied by 4 and the next one divided by 4 at the end of each epoch.",
        equalise,
        "on_train_epoch_end",
        steps=245,
        optimizer=adamw,
    ),
    writing(
        "one unit restarted every 15 steps",
        "The weights of one unit are set to the mean of all, as for a new word or class.",
        imprint,
        "training_step",
        every=15,
    ),
    writing(
        "optimizer state cleared every 60 steps",
        "The moments of Adam are cleared every 60 steps.",
        clear_moments,
        every=60,
    ),
    writing(
        "Adam replaced by SGD after two epochs",
        "The optimizer is replaced by another at the end of the second epoch.",
        replace_optimizer,
        "on_train_epoch_end",
        every=2,
    ),
    Kind(
        name="weights tied by copy, module hook",
        group=WRITES,
        practice="The decoder is overwritten with the transposed encoder after each step.",
        module=lambda: Tied(write=tie),
    ),
    Kind(
        name="weights tied by copy every 20 steps, training_step",
        group=WRITES,
        practice="The decoder is overwritten with the transposed encoder every 20 steps.",
        module=lambda: Tied(write=tie, hook="training_step", every=20),
    ),
    Kind(
        name="binarised weights in forward and backward",
        group=WRITES,
        practice="Weights are replaced by their signs in `training_step` and restored before the "
        "update, as in BinaryConnect.",
        module=Binarised,
    ),
    Kind(
        name="data-dependent initialisation",
        group=WRITES,
        practice="Each layer is scaled by the statistics of the first batch, in `training_step`.",
        module=lambda: DataDependentInit(optimizer=adam),
    ),
)

KINDS = (*RESETS, *PROJECTIONS, *OTHERS)
