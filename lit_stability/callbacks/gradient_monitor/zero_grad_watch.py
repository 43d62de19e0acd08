"""Reports gradients that are never zeroed between two optimizer steps. May import Lightning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.callbacks.gradient_monitor.reporter import log
from lit_stability.lightning_package import Trainer

_ROW = 10
"""Steps in a row without a ``zero_grad()`` after which it is reported."""


@dataclass
class _LastStep:
    """The smallest gradient of an optimizer, as it was before its last step."""

    parameter: nn.Parameter
    grad: Tensor
    version: int
    backwards: int
    """Backward passes of the fit until then."""
    row: int = 0
    """Steps in a row before which the gradients were not zeroed."""


class ZeroGradWatch:
    """Reports once that each step adds the gradients of all earlier batches to its own.

    That is a `training_step` in manual optimization, or an `optimizer_zero_grad`, that does not
    zero them. ``zero_grad()`` either removes a gradient, so that the next backward pass makes
    another tensor, or writes zeros into it; each write raises the version counter of a tensor by
    one. A gradient that is the same tensor as before the last step, and was written to once, by
    the backward pass, was not zeroed. It is not looked for where there is any other reason for a
    write, such as two backward passes or clipping, nor once an optimizer was seen to zero its
    gradients. A write to ``grad.data`` raises no counter, so before the report one value is read
    from the device: a gradient of 0 at the start of a backward pass was zeroed.

    Args:
        trainer: at the start of its fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._backwards = 0
        self._last: dict[int, _LastStep | None] = {}
        """By `id` of the optimizer; None once there is nothing more to look for."""

    def backward(self) -> None:
        """Counts a backward pass, before it runs."""
        self._backwards += 1
        for key, last in self._last.items():
            if last is not None and last.row == _ROW - 1 and not last.grad.any():
                self._last[key] = None

    def step(self, optimizer: Optimizer) -> None:
        """Looks at the gradients of an optimizer, before it steps."""
        key = id(optimizer)
        if key not in self._last:
            self._last[key] = self._first(optimizer)
            return
        last = self._last[key]
        if last is None:
            return
        grad = last.parameter.grad
        passes = self._backwards - last.backwards
        if grad is not last.grad or grad._version != last.version + 1 or passes != 1:
            self._last[key] = None
            return
        last.version, last.backwards, last.row = grad._version, self._backwards, last.row + 1
        if last.row == _ROW:
            self._last[key] = None
            self._report()

    def _first(self, optimizer: Optimizer) -> _LastStep | None:
        trained = (p for group in optimizer.param_groups for p in group["params"])
        smallest = min((p for p in trained if p.grad is not None), key=Tensor.numel, default=None)
        if smallest is None:
            return None
        grad = smallest.grad
        return _LastStep(smallest, grad, grad._version, self._backwards)

    def _report(self) -> None:
        if self._trainer.is_global_zero:
            log.warning(
                "step %d: the gradients were not zeroed in the last %d steps, so that each adds "
                "those of all earlier batches to its own; call zero_grad() before the backward "
                "pass",
                self._trainer.global_step,
                _ROW,
            )
