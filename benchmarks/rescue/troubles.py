"""What goes wrong in a run: once from outside, or with its data, as often as these come.

A fault of `lit_stability.faults` strikes once: the step that is taken again is clean. Real data do
not mend themselves, so there are two more ways: a fault that strikes whenever the batches come
that it first struck, and data that are spoiled before the Trainer sees them.
May import Lightning and `lit_stability`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_stability.faults import Fault, FaultInjector
from lit_stability.measurement.tensor_tree import tensors_in


@dataclass(frozen=True)
class Trouble:
    """Something that goes wrong; this one does not."""

    def callbacks(self) -> list[Callback]:
        """What the Trainer is given before any protection."""
        return []

    def spoil(self, data: DataLoader[Any]) -> None:
        """Change a loader before the fit."""


@dataclass(frozen=True)
class Struck(Trouble):
    """A fault from outside, as many batches long as it says, and no longer."""

    fault: Callable[[], Fault]

    def callbacks(self) -> list[Callback]:
        """See `Trouble`."""
        return [FaultInjector([self.fault()])]


@dataclass(frozen=True)
class Bound(Trouble):
    """A fault that is bound to its data: it returns with the batches that it first struck."""

    fault: Callable[[], Fault]

    def callbacks(self) -> list[Callback]:
        """See `Trouble`."""
        return [BoundInjector(self.fault())]


@dataclass(frozen=True)
class Spoiled(Trouble):
    """Data that are wrong as they are loaded, whoever asks for them again.

    Args:
        first: number of the first such batch, counted from 0 over all epochs.
        how: changes the floating-point tensors of a batch, given one and its place among them.
        last: number of the last such batch, None for one batch.
    """

    first: int
    how: Callable[[Tensor, int], Tensor]
    last: int | None = None

    def spoil(self, data: DataLoader[Any]) -> None:
        """Put the change behind the loader's own collation."""
        data.collate_fn = _Spoiling(self, data.collate_fn)


class _Spoiling:
    """Counts the batches that it makes, and spoils those whose turn it is."""

    def __init__(self, trouble: Spoiled, collate: Callable[[Any], Any]) -> None:
        self.trouble, self.collate, self.made = trouble, collate, 0

    def __call__(self, samples: Any) -> Any:
        batch, number = self.collate(samples), self.made
        self.made += 1
        last = self.trouble.first if self.trouble.last is None else self.trouble.last
        if self.trouble.first <= number <= last:
            floating = [t for t in tensors_in(batch) if t.is_floating_point()]
            for place, tensor in enumerate(floating):
                tensor.copy_(self.trouble.how(tensor, place))
        return batch


def scaled(factor: float) -> Callable[[Tensor, int], Tensor]:
    """Inputs, the first of the tensors, become this many times as large."""
    return lambda tensor, place: tensor * factor if place == 0 else tensor


def filled(value: float, place: int = 0) -> Callable[[Tensor, int], Tensor]:
    """One of the tensors becomes this value wherever it is not 0."""

    def fill(tensor: Tensor, at: int) -> Tensor:
        return torch.where(tensor == 0, tensor, value) if at == place else tensor

    return fill


class BoundInjector(FaultInjector):
    """Injects a fault whenever a batch comes that it has struck before.

    Args:
        fault: one that leaves the batch as it is, or the batch would not be known again.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__([fault])
        self._struck: set[bytes] = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose by the content of the batch."""
        (fault,), print_ = self.faults, fingerprint(tensors_in(batch))
        if trainer.global_step >= fault.step and len(self._struck) < fault.steps:
            self._struck.add(print_)
        self._active = [fault] if print_ in self._struck else []
        for each in self._active:
            each.on_batch(trainer, pl_module, batch)


def fingerprint(tensors: Sequence[Tensor] | Any) -> bytes:
    """Equal for batches of equal content.

    >>> fingerprint([torch.arange(3)]) == fingerprint([torch.tensor([0, 1, 2])])
    True
    >>> fingerprint([torch.arange(3)]) == fingerprint([torch.tensor([0, 1, 3])])
    False
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.digest()
