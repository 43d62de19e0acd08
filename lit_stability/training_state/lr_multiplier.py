"""A factor on the learning rate that no scheduler can undo.

The nominal value, which schedulers read and write, is scaled when ``optimizer.step`` begins and
put back when it ends. Several owners may hold factors at once: they multiply, and each changes its
own alone. May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer


class LearningRateMultiplier:
    """Scales the learning rate of every parameter group around each step.

    Works with float and tensor learning rates, any scheduler, fused optimizers and a loss scaler.
    If a step raises, the next one starts from the nominal value again. At factor 1 a step is left
    untouched.

    Args:
        optimizer: whose steps to scale; `learning_rate_multiplier` gives everybody the same
        instance.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)
        self._inside = False
        self._nominal: list[float] | None = None
        self._written: list[float] = []
        self._held: dict[str, tuple[float, ...]] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def factors(self) -> tuple[float, ...]:
        """What each group is scaled by: the product of what the owners hold."""
        groups = zip_longest(*self._held.values(), fillvalue=1.0)
        return tuple(math.prod(factors) for factors in groups)

    def held_by(self, owner: str) -> tuple[float, ...]:
        """The factors of an owner, one for each group, or none."""
        return self._held.get(owner, ())

    def set(self, factors: Sequence[float], owner: str) -> None:
        """Scale each group by its factor, from this step on, on top of what other owners hold.

        Callable inside a step's closure too: the update that follows already obeys.

        Args:
            factors: one for each parameter group, in (0, 1].
            owner: name of the caller, such as "rollback". Its earlier factors are replaced, those
                of other owners are unchanged.

        Raises:
            ValueError: if a factor is out of its range, or they do not fit the groups.
        """
        groups = self._groups()
        if len(factors) != len(groups):
            raise ValueError(f"{len(factors)} factors for {len(groups)} parameter groups")
        for factor in factors:
            if not 0 < factor <= 1:
                raise ValueError(f"a learning-rate factor must be in (0, 1], got {factor!r}")
        nominal = self.nominal()
        self._held[owner] = tuple(factors)
        if self._inside:
            self._nominal = nominal
            self._write()

    def nominal(self) -> list[float]:
        """Learning rate of each group as the scheduler wrote it, also inside a step."""
        return list(self._nominal) if self._nominal is not None else self._read()

    def effective(self) -> list[float]:
        """Learning rate of each group that the next update uses."""
        nominal = self.nominal()
        # A group that was added since the factors were set is not scaled.
        factors = self.factors
        factors += (1.0,) * (len(nominal) - len(factors))
        return [n * f for n, f in zip(nominal, factors, strict=True)]

    def detach(self) -> None:
        """Leave the optimizer alone from now on, at its nominal learning rate."""
        self.recover()
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            _SCALES.pop(optimizer, None)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.recover()
        self._inside = True
        if any(f < 1 for f in self.factors):
            self._nominal = self._read()
            self._write()

    def recover(self) -> None:
        """Undo what a step that raised left behind."""
        if self._nominal is not None and self._read() == self._written:
            _assign(self._groups(), self._nominal)
        self._nominal = None
        self._inside = False

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._nominal is not None:
            _assign(self._groups(), self._nominal)
        self._nominal = None
        self._inside = False

    def _groups(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        return [] if optimizer is None else optimizer.param_groups

    def _read(self) -> list[float]:
        return [float(g["lr"]) for g in self._groups()]

    def _write(self) -> None:
        _assign(self._groups(), self.effective())
        self._written = self._read()


_SCALES: WeakKeyDictionary[Optimizer, LearningRateMultiplier] = WeakKeyDictionary()


def learning_rate_multiplier(optimizer: Optimizer) -> LearningRateMultiplier:
    """The scale of an optimizer, the same one for everybody who asks."""
    if optimizer not in _SCALES:
        _SCALES[optimizer] = LearningRateMultiplier(optimizer)
    return _SCALES[optimizer]


def _assign(groups: list[dict[str, Any]], rates: Sequence[float]) -> None:
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
