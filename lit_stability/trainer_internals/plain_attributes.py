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
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import Metric

from lit_stability.lightning_choice import LIGHTNING_ROOTS
from lit_stability.lightning_package import Callback, LightningModule, Trainer

_FLAGS = (bool, int, str, type(None))
_PLAIN = (*_FLAGS, float, complex)
_LARGEST = 2**24
"""Bytes of the largest tensor that is copied; a larger one is state that belongs in a buffer."""
_SMALL = 2**12
"""Bytes up to which a tensor is copied every time. A larger one is if its version has changed,
which writes through ``data`` do not do."""
_SCAN_EVERY = 16
"""Captures after which all attributes are looked through, and not only those known to be plain."""
_OURS = "lit_stability"
_THEIRS = (*LIGHTNING_ROOTS, "torchmetrics")


@dataclass
class _Value:
    owner: Any
    name: str
    value: Any
    copy: Tensor | None
    version: int

    def is_kept(self, attributes: dict[str, Any]) -> bool:
        """Whether the attribute needs no new copy; quick, but not for a small tensor."""
        if attributes.get(self.name, _MISSING) is not self.value:
            return False
        if self.copy is None:
            return True
        return self.copy.nbytes > _SMALL and self.value._version == self.version

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


class _Owner:
    """An object and the values in its attributes."""

    def __init__(self, owner: Any) -> None:
        self.owner, self._foreign = owner, _not_the_users(owner)
        self.values: list[_Value] = []
        self._size = -1

    def capture(self, *, scan: bool) -> None:
        attributes = vars(self.owner)
        same_names = len(attributes) == self._size and not scan
        if same_names and all(each.is_kept(attributes) for each in self.values):
            return
        self._size = len(attributes)
        self.values = [_value(self.owner, *item) for item in self.plain()]

    def plain(self) -> Iterator[tuple[str, Any]]:
        """Yields the attributes that are copied."""
        for name, value in vars(self.owner).items():
            if name in self._foreign:
                continue
            if type(value) in _PLAIN or (type(value) is Tensor and _is_small(value)):
                yield name, value


class PlainAttributes:
    """Copies of all numbers, flags, texts and small tensors in the attributes of some objects.

    Lists, dicts and other objects are not copied: what they hold is not known.

    Args:
        owners: modules, callbacks and optimizers; attributes of torch and Lightning are left out.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self._owners = [_Owner(each) for each in owners]
        self._captures = 0

    def capture(self) -> None:
        """Copies the present values."""
        scan = self._captures % _SCAN_EVERY == 0
        self._captures += 1
        for each in self._owners:
            each.capture(scan=scan)

    @property
    def _values(self) -> Iterator[_Value]:
        return (value for each in self._owners for value in each.values)

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
        known = {id(each.owner) for each in self._owners}
        self._owners += [_Owner(each) for each in owners if id(each) not in known]

    def _added(self) -> list[tuple[Any, str]]:
        found = []
        for each in self._owners:
            known = {value.name for value in each.values}
            names = (name for name, _ in each.plain())
            found += [(each.owner, n) for n in names if n not in known and not n.startswith("_")]
        return found


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


def _is_small(value: Tensor) -> bool:
    """Whether a tensor is copied: a large one, or one with a graph, is no running state."""
    tracked = value.requires_grad or value.is_inference() or value.layout is not torch.strided
    return not tracked and value.numel() * value.element_size() <= _LARGEST


def _value(owner: Any, name: str, value: Any) -> _Value:
    if isinstance(value, Tensor):
        return _Value(owner, name, value, value.detach().clone(), value._version)
    return _Value(owner, name, value, None, 0)


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
