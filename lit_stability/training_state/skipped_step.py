"""Shows gradients of 0 to every hook after a step was skipped, and none to the step itself.

A callback skips a step by setting the gradients to None: then an optimizer changes nothing. Between
that and the step, Lightning clips gradients, and hooks of the user read or change them. None of
these expects that all gradients are missing: ``clip_grad_value_`` raises, ``p.grad.norm()`` too.
May import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.distributed.dtensor import local


class SkipGate:
    """Holds the gradients of a skipped step back from the optimizer.

    From the verdict to the next ``zero_grad`` the gradients are 0, so that clipping, logging and
    ``error_if_nonfinite`` work on them. While ``optimizer.step`` runs they are None, whatever hooks
    have added to them. Gradients that were None before the verdict stay None.

    Args:
        optimizer: whose steps may be skipped. Use `skip_gate` to get the one instance of it.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.AdamW([weight], weight_decay=0.5)
    >>> weight.grad = torch.tensor([torch.nan])
    >>> gate = skip_gate(optimizer)
    >>> gate.before_verdict(); weight.grad = None; gate.after_verdict()
    >>> gate.skipped, weight.grad
    (True, tensor([0.]))
    >>> optimizer.step(); weight.item(), weight.grad, optimizer.state
    (1.0, tensor([0.]), defaultdict(<class 'dict'>, {}))
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)
        self.skipped = False
        """Whether the step that was judged last is skipped."""
        self._judged: list[tuple[Tensor, Tensor]] = []
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def before_verdict(self) -> None:
        """Records the gradients of a step that callbacks may skip."""
        self.skipped, self._hidden = False, []
        self._judged = self._gradients()

    def after_verdict(self) -> None:
        """Sets the gradients to 0 if all of them were removed."""
        judged, self._judged = self._judged, []
        self.skipped = bool(judged) and all(p.grad is None for p in self._parameters())
        if self.skipped:
            _clear([grad for _, grad in judged])
            _assign(judged)

    def detach(self) -> None:
        """Removes the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            _GATES.pop(optimizer, None)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Hides the gradients now, or after the closure, inside of which the step is judged."""
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._hiding(kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._hiding(args[1]), *args[2:]), kwargs
        self._hide()
        return None

    def _hiding(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        @wraps(closure)
        def call() -> Any:
            result = closure()
            self._hide()
            return result

        return call

    def _hide(self) -> None:
        if self.skipped:
            self._hidden = self._hidden or self._gradients()
            for parameter, _ in self._hidden:
                parameter.grad = None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        hidden, self._hidden = self._hidden, []
        _assign(hidden)

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        return [(p, p.grad) for p in self._parameters() if p.grad is not None]

    def _parameters(self) -> Iterator[Tensor]:
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return (p for group in groups for p in group["params"])


_GATES: WeakKeyDictionary[Optimizer, SkipGate] = WeakKeyDictionary()


def skip_gate(optimizer: Optimizer) -> SkipGate:
    """Returns the gate of an optimizer; all callers get the same instance."""
    if optimizer not in _GATES:
        _GATES[optimizer] = SkipGate(optimizer)
    return _GATES[optimizer]


def is_skipped(optimizer: Optimizer) -> bool:
    """Returns whether the next step of an optimizer is skipped.

    Call it in ``on_before_optimizer_step``, after the callbacks that may skip the step.
    """
    gate = _GATES.get(optimizer)
    if gate is not None and gate.skipped:
        return True
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def _clear(gradients: list[Tensor]) -> None:
    torch._foreach_zero_([local(grad) for grad in gradients if not grad.is_sparse])
    for grad in gradients:
        if grad.is_sparse:
            grad.zero_()


def _assign(gradients: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, grad in gradients:
        if parameter.grad is None:
            parameter.grad = grad
