"""Computes the update of an optimizer a second time from its recorded start, in copies.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_stability.measurement.bit_patterns import Difference, differences
from lit_stability.measurement.majority import Majority, majority
from lit_stability.training_state.skipped_step import is_skipped

_BY_PARAMETER = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.ASGD,
    }
)
"""Optimizers whose update of an element depends on that element alone, and on no other object."""
_CHUNK = 2**22
"""Elements from which on parameters are updated in several parts, to bound the memory."""
_WEIGHT = "weight"
_SCALER = ("grad_scale", "found_inf")
_Start: TypeAlias = tuple[Tensor, dict[str, Any], dict[str, Any]]
"""A parameter, the options of its group, and copies of weight and state before the update."""


def why_no_update_rerun(optimizer: Optimizer) -> str | None:
    """Returns why the update of an optimizer cannot be computed again in copies, or None.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> why_no_update_rerun(torch.optim.AdamW([weight]))
    >>> why_no_update_rerun(torch.optim.LBFGS([weight]))
    'what an update of LBFGS reads and writes is not known'
    """
    if type(optimizer) in _BY_PARAMETER:
        return None
    return f"what an update of {type(optimizer).__name__} reads and writes is not known"


class UpdateRerun:
    """Records the start of the next update, and compares the update with one or two more in copies.

    Weights and moments are copied before the update; afterwards the update is computed again, a few
    parameters at a time. Training tensors are only read.

    Args:
        optimizer: of which `why_no_update_rerun` returns None.
        names: name of each parameter by its id.
        before: called when gradients and weights are as the update will find them.
        after: called after the update with what differs from the first rerun, and which of the
            three was wrong. Not called for a skipped step.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    >>> weight.grad = torch.ones(2)
    >>> found = []
    >>> rerun = UpdateRerun(optimizer, {id(weight): "w"}, lambda: None, found.append)
    >>> optimizer.step(); found
    [[]]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        before: Callable[[], None],
        after: Callable[[list[tuple[Majority, Difference]]], None],
    ) -> None:
        self._names, self._on_before, self._on_after = names, before, after
        self._start: list[_Start] = []
        self.error: str | None = None
        """Why the update could not be computed again, or None."""
        first = optimizer.register_step_post_hook(self._after)
        # What other hooks do to the weights afterwards is not a part of the update.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(first.id, last=False)
        self._handles = [optimizer.register_step_pre_hook(self._before), first]

    def remove(self) -> None:
        """Removes the hooks, and releases the copies."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._start = [], []

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Captures now, or after the closure, in which the gradients are computed."""
        if kwargs.get("closure") is not None:
            closure = self._capturing(optimizer, kwargs["closure"])
            return args, {**kwargs, "closure": closure}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._capturing(optimizer, args[1]), *args[2:]), kwargs
        self._capture(optimizer)
        return None

    def _capturing(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        @wraps(closure)
        def call() -> Any:
            result = closure()
            self._capture(optimizer)
            return result

        return call

    @torch.no_grad()
    def _capture(self, optimizer: Optimizer) -> None:
        self._start = []
        # A fused optimizer unscales the gradients in place.
        if is_skipped(optimizer) or getattr(optimizer, "grad_scale", None) is not None:
            return
        try:
            self._record(optimizer)
        except Exception as error:  # training goes on
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.error, self._start = f"{type(error).__name__}: {error}", []

    def _record(self, optimizer: Optimizer) -> None:
        self._on_before()
        for group in optimizer.param_groups:
            options = {k: _copied(v) for k, v in group.items() if k != "params"}
            for p in group["params"]:
                if p.grad is not None:
                    self._start.append((p, options, _state(optimizer, p)))

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        start, self._start = self._start, []
        if not start:
            return
        try:
            self._on_after([x for chunk in _chunks(start) for x in self._compare(optimizer, chunk)])
        except Exception as error:  # training goes on
            self._failed(error)

    def _compare(
        self, optimizer: Optimizer, chunk: Sequence[_Start]
    ) -> list[tuple[Majority, Difference]]:
        now = self._tensors(chunk, [_state(optimizer, p, copies=False) for p, _, _ in chunk])
        again = self._tensors(chunk, _updated(optimizer, chunk))
        found = differences(now, again)
        if not found:
            return []
        third = self._tensors(chunk, _updated(optimizer, chunk))
        apart = {each.name for each in differences(again, third)}
        wrong = {each.name for each in differences(now, third)}
        verdicts = (
            majority(first=False, second=each.name not in wrong, reruns=each.name not in apart)
            for each in found
        )
        return list(zip(verdicts, found, strict=True))

    def _tensors(
        self, chunk: Sequence[_Start], states: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for (p, _, _), state in zip(chunk, states, strict=True):
            name = self._names.get(id(p), "a parameter")
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[name if key == _WEIGHT else f"{key} of {name}"] = value
        return tensors


def _chunks(start: list[_Start]) -> Iterator[list[_Start]]:
    """Splits parameters so that the copies of each part are small, and their number too."""
    chunk: list[_Start] = []
    for item in start:
        chunk.append(item)
        if sum(p.numel() for p, _, _ in chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _state(optimizer: Optimizer, p: Tensor, *, copies: bool = True) -> dict[str, Any]:
    """Returns the state of a parameter, with the parameter itself as one more."""
    state = {_WEIGHT: p.detach(), **optimizer.state.get(p, {})}
    return {k: _copied(v) for k, v in state.items()} if copies else state


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _updated(optimizer: Optimizer, chunk: Sequence[_Start]) -> list[dict[str, Any]]:
    """Returns the states of copies of some parameters and moments after their update."""
    # A copy of an optimizer has no hooks.
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    # A loss scaler leaves these on a fused optimizer, for this step.
    vars(twin).update({key: vars(optimizer)[key] for key in _SCALER if key in vars(optimizer)})
    groups: dict[int, dict[str, Any]] = {}
    weights = []
    for p, options, start in chunk:
        begin = {key: _copied(value) for key, value in start.items()}
        weight = nn.Parameter(begin.pop(_WEIGHT), requires_grad=p.requires_grad)
        weight.grad = p.grad
        if begin:
            twin.state[weight] = begin
        if id(options) not in groups:
            groups[id(options)] = {**{k: _copied(v) for k, v in options.items()}, "params": []}
        groups[id(options)]["params"].append(weight)
        weights.append(weight)
    twin.param_groups = list(groups.values())
    type(twin).step(twin)
    return [_state(twin, weight, copies=False) for weight in weights]
