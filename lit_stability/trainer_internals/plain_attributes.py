"""Values that a program keeps in attributes of its module and callbacks: counters, flags, averages.

Lightning and torch know nothing of them, but a training step may read them, as it reads a buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import Metric

_FLAGS = (bool, int, str, type(None))
_PLAIN = (*_FLAGS, float, complex)
_LARGEST = 2**24
"""Bytes of the largest tensor that is copied; a larger one is state that belongs in a buffer."""
_OURS = "lit_stability"
_THEIRS = ("lightning", "pytorch_lightning", "torchmetrics")


@dataclass
class _Value:
    owner: Any
    name: str
    value: Any
    copy: Tensor | None

    def is_same(self) -> bool:
        now = vars(self.owner).get(self.name, _MISSING)
        if self.copy is None:
            if type(now) is not type(self.value):
                return False
            return bool(now == self.value or (now != now and self.value != self.value))
        if now is not self.value or self.copy.shape != now.shape:
            return False
        return torch.equal(now, self.copy)

    def is_first_number(self) -> bool:
        """Whether the value is finite and the attribute is unset now, as before its first use."""
        unset = vars(self.owner).get(self.name) is None
        return unset and type(self.value) is float and math.isfinite(self.value)

    @torch.no_grad()
    def restore(self) -> None:
        vars(self.owner)[self.name] = self.value
        if self.copy is not None:
            self.value.resize_(self.copy.shape).copy_(self.copy)


_MISSING = object()


class PlainAttributes:
    """Copies of all numbers, flags, texts and small tensors in the attributes of some objects.

    Lists, dicts and other objects are not copied: what they hold is not known.

    Args:
        owners: modules, callbacks and optimizers; attributes of torch and Lightning are left out.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self._owners = [(each, _not_the_users(each)) for each in owners]
        self._values: list[_Value] = []

    def capture(self) -> None:
        """Copies the present values."""
        self._values = [
            _Value(owner, name, value, _copy(value))
            for owner, foreign in self._owners
            for name, value in _plain(owner, foreign)
        ]

    def restore(self, *, flags_only: bool = False) -> None:
        """Restores the values, and removes attributes that were added since.

        Args:
            flags_only: leave floats and tensors as they are, except a number that is unset now.
        """
        for each in self._values:
            if not flags_only or type(each.value) in _FLAGS or each.is_first_number():
                each.restore()
        if flags_only:
            return
        for owner, name in self._added():
            del vars(owner)[name]

    def changed(
        self, *, flags_only: bool = False, of: Callable[[Any], bool] = lambda _: True
    ) -> tuple[str, ...]:
        """Returns the attributes that have changed since, such as ``Codebook.seen``.

        Args:
            flags_only: leave out floats and tensors.
            of: which objects to look at.
        """
        asked = [v for v in self._values if not flags_only or type(v.value) in _FLAGS]
        changed = (v for v in asked if of(v.owner) and not v.is_same())
        names = (f"{type(v.owner).__name__}.{v.name}" for v in changed)
        return tuple(dict.fromkeys(names))

    def changed_owners(self) -> list[Any]:
        """Returns the objects of which a value has changed since."""
        changed = (each.owner for each in self._values if not each.is_same())
        return list({id(owner): owner for owner in changed}.values())

    def watch(self, owners: Iterable[Any]) -> None:
        """Includes further objects from the next capture on."""
        known = {id(owner) for owner, _ in self._owners}
        self._owners += [(o, _not_the_users(o)) for o in owners if id(o) not in known]

    def _added(self) -> list[tuple[Any, str]]:
        known = {(id(each.owner), each.name) for each in self._values}
        return [
            (owner, name)
            for owner, foreign in self._owners
            for name, _ in _plain(owner, foreign)
            if (id(owner), name) not in known and not name.startswith("_")
        ]


def owners_in(trainer: Trainer, pl_module: LightningModule, *, of_torch: bool) -> list[Any]:
    """Returns the modules and optimizers whose attributes may be state, metrics excepted.

    Args:
        trainer: owner of the optimizers.
        pl_module: the module in training.
        of_torch: include modules of torch, which only change where a program sets an option.
    """
    foreign = _THEIRS if of_torch else ("torch", *_THEIRS)
    modules = (m for m in pl_module.modules() if not isinstance(m, Metric))
    optimizers = filter(is_of_the_user, trainer.optimizers)
    return [*(m for m in modules if not _is_of(type(m), foreign)), *optimizers]


def is_of_the_user(owner: Any) -> bool:
    """Returns whether a callback's or optimizer's class is of no package that is known here."""
    return not _is_of(type(owner), ("torch", *_THEIRS, _OURS))


def _is_of(cls: type, packages: tuple[str, ...]) -> bool:
    return cls.__module__.split(".")[0] in packages


def _plain(owner: Any, foreign: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for name, value in vars(owner).items():
        if name in foreign:
            continue
        if type(value) in _PLAIN or (type(value) is Tensor and _is_small(value)):
            yield name, value


def _is_small(value: Tensor) -> bool:
    """Whether a tensor is copied: a large one, or one with a graph, is no running state."""
    tracked = value.requires_grad or value.is_inference() or value.layout is not torch.strided
    return not tracked and value.numel() * value.element_size() <= _LARGEST


def _copy(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None


def _not_the_users(owner: Any) -> frozenset[str]:
    """Returns the names of an object that belong to torch or Lightning."""
    if isinstance(owner, nn.Module):
        return _of_modules()
    if isinstance(owner, Optimizer):
        return _of_optimizers()
    others = {b for b in type(owner).__mro__ if _is_of(b, (*_THEIRS, _OURS)) and b is not Callback}
    private = {name for name in vars(owner) if name.startswith("_")} if others else set()
    return frozenset(private)


@functools.cache
def _of_modules() -> frozenset[str]:
    return frozenset(vars(LightningModule())) | frozenset(LightningModule.__annotations__)


@functools.cache
def _of_optimizers() -> frozenset[str]:
    return frozenset({*vars(SGD([torch.zeros(1)], 1.0)), "_opt_called"})
