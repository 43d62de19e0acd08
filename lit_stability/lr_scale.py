"""A factor and a ceiling on the learning rate that no scheduler can undo.

The nominal value, which schedulers read and write, is scaled when ``optimizer.step`` begins and
put back when it ends. May import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer


class LearningRateScale:
    """Scales the learning rate of every parameter group around each step.

    Works with float and tensor learning rates, any scheduler, fused optimizers and a loss scaler.
    If a step raises, the next one starts from the nominal value again. At factor 1 without a
    ceiling a step is left untouched.

    Args:
        optimizer: whose steps to scale; `learning_rate_scale` gives everybody the same instance.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)
        self._inside = False
        self._nominal: list[float] | None = None
        self._written: list[float] = []
        self.factor = 1.0
        self.ceilings: tuple[float, ...] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def set(self, factor: float = 1.0, ceilings: Sequence[float] | None = None) -> None:
        """Scale by ``factor``, then cap each group at its ceiling; both hold from this step on.

        Callable inside a step's closure too: the update that follows already obeys.

        Args:
            factor: in (0, 1].
            ceilings: largest learning rate of each group, or None for no cap.

        Raises:
            ValueError: if the factor is out of its range, or the ceilings do not fit the groups.
        """
        groups = self._groups()
        if not 0 < factor <= 1:
            raise ValueError(f"the learning-rate factor must be in (0, 1], got {factor!r}")
        if ceilings is not None and len(ceilings) != len(groups):
            raise ValueError(f"{len(ceilings)} ceilings for {len(groups)} parameter groups")
        nominal = self.nominal()
        self.factor = factor
        self.ceilings = None if ceilings is None else tuple(ceilings)
        if self._inside:
            self._nominal = nominal
            self._write()

    def nominal(self) -> list[float]:
        """Learning rate of each group as the scheduler wrote it, also inside a step."""
        return list(self._nominal) if self._nominal is not None else self._read()

    def effective(self) -> list[float]:
        """Learning rate of each group that the next update uses."""
        rates = [n * self.factor for n in self.nominal()]
        if self.ceilings is None:
            return rates
        return [min(r, c) for r, c in zip(rates, self.ceilings, strict=True)]

    def detach(self) -> None:
        """Leave the optimizer alone from now on, at its nominal learning rate."""
        self._recover()
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            _SCALES.pop(optimizer, None)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._recover()
        self._inside = True
        if self.factor < 1 or self.ceilings is not None:
            self._nominal = self._read()
            self._write()

    def _recover(self) -> None:
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


_SCALES: WeakKeyDictionary[Optimizer, LearningRateScale] = WeakKeyDictionary()


def learning_rate_scale(optimizer: Optimizer) -> LearningRateScale:
    """The scale of an optimizer, the same one for everybody who asks."""
    if optimizer not in _SCALES:
        _SCALES[optimizer] = LearningRateScale(optimizer)
    return _SCALES[optimizer]


def _assign(groups: list[dict[str, Any]], rates: Sequence[float]) -> None:
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
