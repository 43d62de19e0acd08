"""Small runs with one known mistake each, of kinds that users report: see `benchmarks.causes`.

Each case has the names of the causes that are right. Where a kind has several faces (a slope, a
value, a matrix), there is a case for each. Imports Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_stability.faults import Fault, ScaleGradients

OPERATION = ("operation outside its domain",)
CONSTANT = ("non-finite constant",)
BATCH = ("bad batch", "loss or labels")
RATE = ("learning rate too high",)
OF_RECURRENCE = ("recurrent gain too large", "exploding gradient", "initialisation")

Loss = Callable[[nn.Module, list[Tensor]], Tensor]


class Fitted(LightningModule):
    """A network, its loss, and an optimizer by name.

    Args:
        net: Network.
        loss: Loss of the network on a batch.
        optimizer: Name in `torch.optim`.
        options: Of the optimizer.
    """

    def __init__(self, net: nn.Module, loss: Loss, optimizer: str, **options: Any) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer_name, self.options = net, loss, optimizer, options

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the loss."""
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        kind = getattr(torch.optim, self.optimizer_name)
        return kind(self.parameters(), **self.options)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class FieldCase:
    """A run with one mistake."""

    name: str
    causes: tuple[str, ...]
    """Names in `lit_stability.diagnosis.CAUSES`, each of which is right; none if no cause of the
    catalogue is, so that *unknown* is right."""
    net: Callable[[], nn.Module]
    loss: Loss
    data: Callable[[], DataLoader[Any]]
    optimizer: str = "Adam"
    options: dict[str, Any]
    steps: int = 120
    faults: Callable[[], list[Fault]] = list


def mlp(inputs: int = 6, outputs: int = 1, width: int = 32) -> Callable[[], nn.Module]:
    """Returns a function that creates a network with two hidden layers."""
    return lambda: nn.Sequential(
        *(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, outputs),
    )


def rows(change: Callable[[Tensor, Tensor], None] | None = None, batch: int = 16) -> Any:
    """Returns a function that creates 640 rows: 6 inputs, a linear target, changed in place."""

    def make() -> DataLoader[Any]:
        g = torch.Generator().manual_seed(3)
        x = torch.randn(640, 6, generator=g)
        y = x[:, :1] - 0.5 * x[:, 1:2]
        if change is not None:
            change(x, y)
        return DataLoader(TensorDataset(x, y), batch, shuffle=True, generator=g)

    return make


def classes(count: int, batch: int = 16) -> Any:
    """Returns a function that creates 640 rows with 6 inputs and a class of the first ``count``."""

    def make() -> DataLoader[Any]:
        g = torch.Generator().manual_seed(4)
        x = torch.randn(640, 6, generator=g)
        return DataLoader(
            TensorDataset(x, x[:, :count].argmax(1)), batch, shuffle=True, generator=g
        )

    return make


def sequences() -> DataLoader[Any]:
    """Returns 320 sequences of 60 steps with 4 features, whose target is the sum of the first."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(320, 60, 4, generator=g)
    return DataLoader(TensorDataset(x, x[:, :, :1].mean(1)), 16, shuffle=True, generator=g)


def square(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the mean squared error."""
    return F.mse_loss(net(batch[0]), batch[1])


def between(margin: float, net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the mean distance of rows from targets that some rows equal; its slope there."""
    out = net(batch[0])
    same = batch[0][:, :1] > margin
    target = torch.where(same, out.detach(), batch[1])
    return (out - target).square().sum(-1).sqrt().mean()


def own_density(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the mean of -log of a Gaussian density, which underflows far from the mean."""
    mean, width = net(batch[0]).chunk(2, -1)
    width = width.sigmoid() * 0.1
    z = (batch[1] - mean) / width
    return -(torch.exp(-0.5 * z * z) / width).log().mean()


def log_variance(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the Gaussian NLL with an unbounded log-variance, on inputs of scale 1000."""
    mean, log_var = net(batch[0] * 1000.0).chunk(2, -1)
    return ((batch[1] - mean).square() / (1e-3 + log_var.exp()) + log_var.exp()).mean()


def whitened(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the error after a whitening by eigenvectors, of which two eigenvalues are equal."""
    hidden = net(batch[0])
    hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :2])], 1)
    covariance = hidden.T @ hidden / len(hidden) + 1e-3 * torch.eye(hidden.shape[1])
    values, vectors = torch.linalg.eigh(covariance)
    return F.mse_loss((hidden @ vectors @ values.rsqrt().diag())[:, :1], batch[1])


def volume(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the error and the log-determinant of a covariance without full rank."""
    hidden = net(batch[0])[:, :4]
    twice = torch.cat([hidden, hidden], 1)
    return F.mse_loss(hidden[:, :1], batch[1]) - 1e-3 * torch.logdet(twice.T @ twice)


def masked_rows(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the error of an attention over positions, of which some rows have none."""
    x, y = batch
    scores = net(x).masked_fill(x.abs() > 1.0 if x[0, 0] < 1.5 else x > -9.0, -torch.inf)
    return F.mse_loss((scores.softmax(-1) * x).sum(-1, keepdim=True), y)


def mean_of_chosen(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the mean error of the rows above a bound, of which a batch may have none."""
    chosen = batch[0][:, 0] > 1.4
    error = (net(batch[0]) - batch[1]).square()
    return error[chosen].sum() / chosen.sum()


class ClassWeights(nn.Module):
    """Weights of four classes, of which one has no sample."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        weights = torch.tensor([1.0, 1.0, 1.0, torch.inf])
        self.net = mlp(outputs=4)()
        if buffer:
            self.register_buffer("weights", weights)
        else:
            self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        """Returns log-probabilities, weighted."""
        return self.net(x).log_softmax(-1) * self.weights


def weighted(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the weighted cross entropy."""
    return -(net(batch[0]) * F.one_hot(batch[1], 4)).sum(-1).mean()


def times_nan(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns an error with a coefficient that is NaN."""
    return square(net, batch) + float("nan") * net(batch[0]).abs().mean()


class Recurrent(nn.Module):
    """A plain recurrent network with a gain on its recurrent weights."""

    def __init__(self, gain: float, activation: str = "tanh") -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 64, nonlinearity=activation, batch_first=True)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output at the last position."""
        return self.head(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


def chased(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the error against targets that the network itself has made, and more."""
    with torch.no_grad():
        target = batch[1].abs() + 1.3 * net(batch[0].roll(1, 0)).max(1, keepdim=True)[0]
    return F.mse_loss(net(batch[0])[:, :1], target)


def masked_entropy(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the error and an entropy, of which masked terms are 0 times -inf."""
    logits = net(batch[0]).masked_fill(batch[0] > 2.5, -torch.inf)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return F.mse_loss(net(batch[0])[:, :1], batch[1]) - 0.01 * entropy


def standardised(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the error of outputs that are divided by their deviation in the batch."""
    hidden = net(batch[0])
    return F.mse_loss((hidden / (hidden.std(0) + 1e-3))[:, :1], batch[1])


def precision(net: nn.Module, batch: list[Tensor]) -> Tensor:
    """Returns the error and the trace of an inverse that does not exist."""
    hidden = net(batch[0])
    twice = torch.cat([hidden, hidden], 1)
    inverse = torch.linalg.inv_ex(twice.T @ twice)[0]
    return F.mse_loss(hidden[:, :1], batch[1]) + 1e-9 * inverse.diagonal().sum()


SETTINGS = {"scale": torch.tensor(float("nan"))}
"""Read from a file in which a number is missing."""


def millimetres(x: Tensor, y: Tensor) -> None:
    """Gives a block of rows in another unit."""
    x[300:310].mul_(1e4)
    y[300:310].mul_(1e4)


def outliers(x: Tensor, y: Tensor) -> None:
    """Makes the targets of one row in 320 far too large."""
    y[7::320] = 1e5


def nans(x: Tensor, y: Tensor) -> None:
    """Makes an input of one row in 320 NaN."""
    x[7::320, 2] = torch.nan


def amounts(x: Tensor, y: Tensor) -> None:
    """Makes the targets amounts of money."""
    y.mul_(0.3).exp_().mul_(2e5)


def counters(x: Tensor, y: Tensor) -> None:
    """Makes the inputs counters."""
    x.mul_(500.0).add_(2000.0)


FIELD: tuple[FieldCase, ...] = (
    FieldCase(
        name="slope of a root at 0",
        causes=OPERATION,
        net=mlp(),
        loss=lambda net, batch: between(2.0, net, batch),
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="density that underflows",
        causes=OPERATION,
        net=mlp(outputs=2),
        loss=own_density,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="log-variance without a bound",
        causes=(*OPERATION, "data not normalised"),
        net=lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2)),
        loss=log_variance,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="equal eigenvalues",
        causes=OPERATION,
        net=mlp(outputs=8),
        loss=whitened,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="determinant of 0",
        causes=OPERATION,
        net=mlp(outputs=8),
        loss=volume,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="rows without a position",
        causes=OPERATION,
        net=mlp(outputs=6),
        loss=masked_rows,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="mean over nothing",
        causes=OPERATION,
        net=mlp(),
        loss=mean_of_chosen,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="weight of a class without samples",
        causes=CONSTANT,
        net=lambda: ClassWeights(buffer=False),
        loss=weighted,
        data=classes(3),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="weight of a class without samples, in a buffer",
        causes=CONSTANT,
        net=lambda: ClassWeights(buffer=True),
        loss=weighted,
        data=classes(3),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="coefficient that is NaN",
        causes=CONSTANT,
        net=mlp(),
        loss=times_nan,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="LBFGS on mini-batches",
        causes=("LBFGS on mini-batches",),
        net=mlp(),
        loss=lambda net, batch: F.mse_loss(net(batch[0]), batch[1] * batch[0][:, 2:3] * 5),
        data=rows(),
        optimizer="LBFGS",
        options={"lr": 1.0, "max_iter": 20},
        steps=60,
    ),
    FieldCase(
        name="recurrent gain of 1.6",
        causes=OF_RECURRENCE,
        net=lambda: Recurrent(1.6),
        loss=square,
        data=sequences,
        optimizer="SGD",
        options={"lr": 0.1},
    ),
    FieldCase(
        name="recurrent gain of 1.6, rectified",
        causes=OF_RECURRENCE,
        net=lambda: Recurrent(1.6, "relu"),
        loss=square,
        data=sequences,
        optimizer="SGD",
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="burst of large gradients, ordinary loss",
        causes=("exploding gradient", "glitch"),
        net=mlp(),
        loss=square,
        data=rows(),
        options={"lr": 1e-3},
        faults=lambda: [ScaleGradients(step=60, factor=1e3, steps=5)],
    ),
    FieldCase(
        name="learning rate too high, SGD",
        causes=RATE,
        net=mlp(),
        loss=square,
        data=rows(),
        optimizer="SGD",
        options={"lr": 3.0, "momentum": 0.9},
    ),
    FieldCase(
        name="targets that are amounts",
        causes=("data not normalised",),
        net=mlp(),
        loss=square,
        data=rows(amounts),
        optimizer="SGD",
        options={"lr": 0.1},
    ),
    FieldCase(
        name="inputs that are counters",
        causes=("data not normalised",),
        net=lambda: nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 1)),
        loss=square,
        data=rows(counters),
        optimizer="SGD",
        options={"lr": 0.01},
    ),
    FieldCase(
        name="targets that are outliers",
        causes=BATCH,
        net=mlp(),
        loss=square,
        data=rows(outliers),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="NaN in a row",
        causes=BATCH,
        net=mlp(),
        loss=square,
        data=rows(nans),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="targets that run away",
        causes=(),
        net=mlp(outputs=4),
        loss=chased,
        data=rows(),
        options={"lr": 3e-3},
        steps=1200,
    ),
    FieldCase(
        name="momentum of 0.99",
        causes=("momentum too high", *RATE),
        net=mlp(),
        loss=square,
        data=rows(),
        optimizer="SGD",
        options={"lr": 0.3, "momentum": 0.99},
    ),
    FieldCase(
        name="entropy of a masked distribution",
        causes=OPERATION,
        net=mlp(outputs=6),
        loss=masked_entropy,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="deviation of a last batch of one",
        causes=OPERATION,
        net=mlp(outputs=4),
        loss=standardised,
        data=rows(batch=213),
        options={"lr": 1e-3},
        steps=40,
    ),
    FieldCase(
        name="factor that is read as NaN",
        causes=CONSTANT,
        net=mlp(),
        loss=lambda net, batch: square(net, batch) * SETTINGS["scale"],
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="inverse of a singular matrix",
        causes=OPERATION,
        net=mlp(outputs=3),
        loss=precision,
        data=rows(),
        options={"lr": 1e-3},
    ),
    FieldCase(
        name="one batch of another scale",
        causes=BATCH,
        net=lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)),
        loss=square,
        data=rows(millimetres),
        options={"lr": 1e-3},
    ),
)
