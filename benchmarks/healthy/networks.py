"""Small modules and data that the kinds are made of.

Imports Lightning and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

Loss = Callable[[nn.Module, Sequence[Tensor]], Tensor]
Hook = Literal["training_step", "on_train_batch_end", "optimizer_step", "on_train_epoch_end"]
WIDTH, INPUTS = 64, 8


def mlp(inputs: int = INPUTS, outputs: int = 1, width: int = WIDTH) -> nn.Sequential:
    """Returns three linear layers, at the indices 0, 2 and 4."""
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def squared_error(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1])


def cross_entropy(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def adam(parameters: Iterable[Any]) -> Optimizer:
    return torch.optim.Adam(parameters, 3e-3)


def adamw(parameters: Iterable[Any]) -> Optimizer:
    return torch.optim.AdamW(parameters, 3e-3, weight_decay=0.01)


def sgd(parameters: Iterable[Any]) -> Optimizer:
    return torch.optim.SGD(parameters, 0.02, momentum=0.9)


class Net(LightningModule):
    """A network with a loss, the ordinary way; kinds change its parts.

    Args:
        net: The network; by default an `mlp`.
        loss: Maps the network and a batch to a loss.
        optimizer: Creates the optimizer from parameters.
        schedule: Creates a scheduler that steps with the optimizer, if given.
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        loss: Loss = squared_error,
        optimizer: Callable[[Iterable[Any]], Optimizer] = adam,
        schedule: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.loss, self.make_optimizer, self.schedule = loss, optimizer, schedule
        self.values: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns the loss of the batch."""
        return self.track(self.loss(self.net, batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss of a held-out batch."""
        self.log("val_loss", self.loss(self.net, batch))

    def track(self, loss: Tensor, value: Tensor | None = None) -> Tensor:
        """Logs a loss and records the value by which the run is judged.

        Args:
            loss: Loss of the step.
            value: Falls as training succeeds; by default the loss itself.
        """
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=True)
        self.values.append(float((loss if value is None else value).detach()))
        return loss

    def configure_optimizers(self) -> Any:
        """Returns the optimizer of all parameters, with its schedule."""
        optimizer = self.make_optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        schedule = {"scheduler": self.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Writing(Net):
    """A network whose weights are written every so often in one of its hooks.

    Args:
        write: Writes into the module; None leaves the writing to a callback.
        hook: The hook that calls it.
        every: Number of optimizer steps, or epochs, from one call to the next.
        **options: See `Net`.
    """

    def __init__(
        self,
        write: Callable[[Any], None] | None = None,
        hook: Hook = "on_train_batch_end",
        every: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.write, self.hook, self.every = write, hook, every

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Writes before the forward pass, if that is the hook."""
        self._write_if_due("training_step", self.global_step)
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Writes directly after the update, if that is the hook."""
        super().optimizer_step(*args, **kwargs)
        self._write_if_due("optimizer_step", self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes at the end of a batch, if that is the hook."""
        self._write_if_due("on_train_batch_end", self.global_step)

    def on_train_epoch_end(self) -> None:
        """Writes at the end of an epoch, if that is the hook."""
        self._write_if_due("on_train_epoch_end", self.current_epoch + 1)

    def _write_if_due(self, hook: str, count: int) -> None:
        if self.write is not None and hook == self.hook and count and count % self.every == 0:
            self.write(self)


class WriteCallback(Callback):
    """Writes the weights of a module, from a callback.

    Args:
        write: Writes into the module.
        every: Number of optimizer steps from one call to the next.
        each_epoch: Writes at the end of each epoch instead.
    """

    def __init__(
        self, write: Callable[[Any], None], every: int = 1, each_epoch: bool = False
    ) -> None:
        self.write, self.every, self.each_epoch = write, every, each_epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Writes every so many steps."""
        if not self.each_epoch and trainer.global_step % self.every == 0:
            self.write(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes each epoch."""
        if self.each_epoch:
            self.write(pl_module)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(*tensors: Tensor, batch: int = 32, shuffle: bool = True) -> DataLoader[Any]:
    """Returns batches in an order drawn from the global generator."""
    return DataLoader(TensorDataset(*tensors), batch, shuffle=shuffle)


def inputs(seed: int, count: int) -> Tensor:
    return torch.randn(count, INPUTS, generator=generator(seed))


def surface(x: Tensor) -> Tensor:
    """Returns a smooth function of the inputs, as a column."""
    return x[:, :1] * x[:, 1:2] + x[:, 2:3].sin() + 0.5 * x[:, 3:4]


def leaky_sum(x: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """Returns a running sum over the first channel of a sequence, which forgets 20 % in each step.

    Args:
        x: Sequences, of shape (samples, steps, channels).
        start: The sum before the first step, of shape (samples, 1).

    Returns:
        The sums, of shape (samples, steps, 1).
    """
    sums = []
    for step in x[..., :1].unbind(1):
        start = 0.8 * start + step
        sums.append(start)
    return torch.stack(sums, 1)


def regression(seed: int, count: int = 1600) -> DataLoader[Any]:
    """Returns inputs and a smooth function of them with a little noise: 50 batches of 32."""
    x = inputs(seed, count)
    return loader(x, surface(x) + 0.1 * torch.randn(count, 1, generator=generator(seed + 1)))


def classes(seed: int, count: int = 1600, number: int = 4, spread: float = 1.0) -> DataLoader[Any]:
    """Returns points around a center for each class, and the classes.

    Args:
        seed: Of the points and centers.
        count: Of the points.
        number: Of the classes.
        spread: Standard deviation around the centers, which are about 6 apart.
    """
    y = torch.randint(number, (count,), generator=generator(seed + 2))
    centers = 1.5 * torch.randn(number, INPUTS, generator=generator(seed + 3))
    return loader(centers[y] + spread * inputs(seed, count), y)


def clusters(seed: int) -> DataLoader[Any]:
    """Returns points around twelve centers, without labels."""
    x, _ = classes(seed, number=12, spread=0.3).dataset.tensors  # type: ignore[attr-defined]
    return loader(x)
