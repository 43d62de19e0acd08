"""Factors on the learning rate, and limits of it, that no scheduler can undo.

The nominal learning rate, which schedulers read and write, is scaled when ``optimizer.step`` begins
and restored when it ends. Several owners can hold factors at once: the factors multiply, the lowest
limit counts, and each owner changes only its own. May import torch.
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
    If a step raises, the next one starts from the nominal value again. With all factors at 1, steps
    are unchanged.

    Args:
        optimizer: the optimizer whose steps are scaled. Use `learning_rate_multiplier` to get the
            one instance that all owners share.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)
        self._inside = False
        self._nominal: list[float] | None = None
        self._written: list[float] = []
        self._held: dict[str, tuple[float, ...]] = {}
        self._limits: dict[str, tuple[float, ...]] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def factors(self) -> tuple[float, ...]:
        """Returns the factor of each parameter group at its present nominal learning rate.

        It is the product over all owners, or less where a limit is below what that gives.
        """
        groups = zip_longest(*self._held.values(), fillvalue=1.0)
        factors = tuple(math.prod(factors) for factors in groups)
        if not self._limits:
            return factors
        limits = [min(each) for each in zip_longest(*self._limits.values(), fillvalue=math.inf)]
        limits += [math.inf] * (len(factors) - len(limits))
        return tuple(
            min(factor, limit / rate) if rate > 0 else factor
            for factor, limit, rate in zip(factors, limits, self.nominal(), strict=False)
        )

    def held_by(self, owner: str) -> tuple[float, ...]:
        """Returns the factors of an owner, one per group; empty if it has set none."""
        return self._held.get(owner, ())

    def set(
        self, factors: Sequence[float], owner: str, limits: Sequence[float] | None = None
    ) -> None:
        """Sets an owner's factors, which multiply with those of other owners, and its limits.

        Inside a step's closure, they apply to the update that follows.

        Args:
            factors: one per parameter group, in (0, 1].
            owner: name of the caller, such as "rollback". Its earlier factors are replaced, those
                of other owners are unchanged.
            limits: largest learning rate of each group, above 0, however high its schedule;
                ``inf`` for none.

        Raises:
            ValueError: if a factor or limit is out of range, or the count is not the number of
                groups.
        """
        groups = self._groups()
        if len(factors) != len(groups):
            raise ValueError(f"{len(factors)} factors for {len(groups)} parameter groups")
        if limits is not None and (len(limits) != len(groups) or not all(x > 0 for x in limits)):
            raise ValueError(f"limits {limits!r} for {len(groups)} parameter groups")
        for factor in factors:
            if not 0 < factor <= 1:
                raise ValueError(f"a learning-rate factor must be in (0, 1], got {factor!r}")
        nominal = self.nominal()
        self._held[owner] = tuple(factors)
        self._limits.pop(owner, None)
        if limits is not None:
            self._limits[owner] = tuple(limits)
        if self._inside:
            self._nominal = nominal
            self._write()

    def nominal(self) -> list[float]:
        """Returns each group's learning rate as the scheduler wrote it, also inside a step."""
        return list(self._nominal) if self._nominal is not None else self._read()

    def effective(self) -> list[float]:
        """Returns each group's learning rate that the next update uses."""
        nominal = self.nominal()
        # A group that was added after the factors were set is not scaled.
        factors = self.factors
        factors += (1.0,) * (len(nominal) - len(factors))
        return [n * f for n, f in zip(nominal, factors, strict=True)]

    def detach(self) -> None:
        """Restores the nominal learning rate and removes the hooks from the optimizer."""
        self.recover()
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            _MULTIPLIERS.pop(optimizer, None)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.recover()
        self._inside = True
        if any(f < 1 for f in self.factors):
            self._nominal = self._read()
            self._write()

    def recover(self) -> None:
        """Restores the nominal learning rate after a step that raised an exception."""
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


_MULTIPLIERS: WeakKeyDictionary[Optimizer, LearningRateMultiplier] = WeakKeyDictionary()


def learning_rate_multiplier(optimizer: Optimizer) -> LearningRateMultiplier:
    """Returns the multiplier of an optimizer; all callers get the same instance."""
    if optimizer not in _MULTIPLIERS:
        _MULTIPLIERS[optimizer] = LearningRateMultiplier(optimizer)
    return _MULTIPLIERS[optimizer]


def _assign(groups: list[dict[str, Any]], rates: Sequence[float]) -> None:
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
