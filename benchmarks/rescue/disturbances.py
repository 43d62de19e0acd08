"""Disturbances of a run: faults injected once, faults that recur with a batch, corrupt data.

A fault of `lit_stability.faults` is injected once, so a retried step is clean. Bad data stay bad,
so there are two more kinds: a fault that recurs whenever its batches recur, and data that are
corrupt before the Trainer receives them. Imports Lightning and `lit_stability`.
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
class Disturbance:
    """Base class: changes nothing."""

    def callbacks(self) -> list[Callback]:
        """Returns callbacks that precede those of the protection."""
        return []

    def corrupt(self, data: DataLoader[Any]) -> None:
        """Changes a DataLoader before the fit."""


@dataclass(frozen=True)
class InjectedFault(Disturbance):
    """A fault that is injected once and does not recur when a step is retried."""

    fault: Callable[[], Fault]

    def callbacks(self) -> list[Callback]:
        """Returns the injector."""
        return [FaultInjector([self.fault()])]


@dataclass(frozen=True)
class BatchFault(Disturbance):
    """A fault that recurs whenever the batches recur in which it was first injected."""

    fault: Callable[[], Fault]

    def callbacks(self) -> list[Callback]:
        """Returns the injector."""
        return [BatchFaultInjector(self.fault())]


@dataclass(frozen=True)
class CorruptData(Disturbance):
    """Data that are corrupt when loaded.

    Args:
        first: Index of the first corrupt batch, counted from 0 over all epochs.
        change: Changes a floating-point tensor of a batch, given the tensor and its index.
        last: Index of the last corrupt batch; None for a single batch.
    """

    first: int
    change: Callable[[Tensor, int], Tensor]
    last: int | None = None

    def corrupt(self, data: DataLoader[Any]) -> None:
        """Applies the change after the loader's own collation."""
        data.collate_fn = _CorruptingCollate(self, data.collate_fn)


class _CorruptingCollate:
    """Counts the collated batches and corrupts those in the range of a `CorruptData`."""

    def __init__(self, corruption: CorruptData, collate: Callable[[Any], Any]) -> None:
        self.corruption, self.collate, self.count = corruption, collate, 0

    def __call__(self, samples: Any) -> Any:
        batch, number = self.collate(samples), self.count
        self.count += 1
        first, last = self.corruption.first, self.corruption.last
        if first <= number <= (first if last is None else last):
            floating = [t for t in tensors_in(batch) if t.is_floating_point()]
            for index, tensor in enumerate(floating):
                tensor.copy_(self.corruption.change(tensor, index))
        return batch


def scaled(factor: float) -> Callable[[Tensor, int], Tensor]:
    """Returns a change that multiplies the first tensor, the inputs, by a factor."""
    return lambda tensor, index: tensor * factor if index == 0 else tensor


def filled(value: float, index: int = 0) -> Callable[[Tensor, int], Tensor]:
    """Returns a change that sets the nonzero elements of one tensor to a value."""

    def fill(tensor: Tensor, tensor_index: int) -> Tensor:
        return torch.where(tensor == 0, tensor, value) if tensor_index == index else tensor

    return fill


class BatchFaultInjector(FaultInjector):
    """Injects a fault whenever a batch recurs in which it was injected before.

    Args:
        fault: A fault that does not change the batch, as batches are recognised by content.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__([fault])
        self._faulty: set[bytes] = set()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Activates the fault if the content of the batch is one of the faulty batches."""
        (fault,), digest = self.faults, fingerprint(tensors_in(batch))
        if trainer.global_step >= fault.step and len(self._faulty) < fault.steps:
            self._faulty.add(digest)
        self._active = [fault] if digest in self._faulty else []
        for active in self._active:
            active.on_batch(trainer, pl_module, batch)


def fingerprint(tensors: Sequence[Tensor] | Any) -> bytes:
    """Returns a hash of the tensors' content.

    >>> fingerprint([torch.arange(3)]) == fingerprint([torch.tensor([0, 1, 2])])
    True
    >>> fingerprint([torch.arange(3)]) == fingerprint([torch.tensor([0, 1, 3])])
    False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
