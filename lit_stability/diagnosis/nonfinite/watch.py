"""Watches every kernel of a step for the birth of non-finite values, and follows them.

A non-finite value inherits its origin from what it was computed of, so that the origin of whatever
reaches the loss is at hand when the step has run. Whose origin, where several meet:

* A NaN comes from the NaNs that went in, else from the Infs; an Inf from what was not finite.
* An Inf put there on purpose (a constant, a mask of -inf) is *excused*: it is passed on, but where
  a NaN is made of excused values alone, the operation that makes it is the origin.
* Of several the earliest.

May import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stability.diagnosis.nonfinite.advice import Kind, kind_of
from lit_stability.diagnosis.nonfinite.call_sites import CallSites, Site, kernel_name
from lit_stability.diagnosis.nonfinite.kernel_call import KernelCall, Operand, traits_of
from lit_stability.diagnosis.nonfinite.origin import Cause, NonFiniteOrigin, TensorRange
from lit_stability.diagnosis.nonfinite.values import (
    has_nan,
    has_zero,
    is_finite_when_wider,
    is_mask,
    is_nonfinite,
    range_of,
    storage_of,
    value_of,
)
from lit_stability.diagnosis.nonfinite.variables import variable_of
from lit_stability.measurement.half_precision import HALF
from lit_stability.training_state.isolated_model import IsolatedModel

_KINDS: dict[Cause, Kind] = {
    "input": "non-finite input",
    "parameter": "non-finite parameter",
    "buffer": "non-finite buffer",
}


@dataclass(frozen=True, slots=True)
class Birth:
    """Where non-finite values came from."""

    order: int
    excused: bool
    origin: NonFiniteOrigin


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, looks at the result of every kernel, forward and backward.

    Args:
        model: its parameters and buffers get their names.
        calls: knows the place in the program.
        state: is told what the step writes to that it did not make itself.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, calls: CallSites, state: IsolatedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._state = calls, state
        self._types = {path: type(m).__name__ for path, m in model.named_modules()}
        self._known: dict[int, tuple[Cause, str]] = {}
        for name, tensor in model.named_buffers():
            self._known[storage_of(tensor)._cdata] = ("buffer", name)
        for name, tensor in model.named_parameters():
            self._known[storage_of(tensor)._cdata] = ("parameter", name)
        # Weak references keep addresses from being given away, not the memory behind them.
        self._made: dict[int, StorageWeakRef] = {}
        self._births: dict[int, tuple[StorageWeakRef, Birth]] = {}
        self._count = 0
        self.in_backward = False
        self._first_in_backward: Birth | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel and look at what it made."""
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits.is_view:
            return func(*args, **kwargs)
        call = KernelCall(func, args, kwargs)
        for tensor in call.written():
            if storage_of(tensor)._cdata not in self._made:
                self._state.copy_memory(tensor)
        out, made = call.run()
        if not traits.is_blank:
            self._judge(call, made)
        if not traits.writes:
            self._remember(call, made)
        return out

    def _remember(self, call: KernelCall, made: list[Tensor]) -> None:
        for tensor in made:
            storage = storage_of(tensor)
            if storage._cdata not in self._made:
                self._made[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            if call.kernel == "_to_copy":  # a cast of a parameter goes by its name
                source = self._known.get(call.operands()[0].memory)
                if source is not None:
                    self._known[storage._cdata] = source

    def _judge(self, call: KernelCall, made: list[Tensor]) -> None:
        bad = [t for t in made if is_nonfinite(t)]
        if bad:
            birth = self._birth_of_result(call, bad)
            for tensor in bad:
                self._note(tensor, birth)

    def _note(self, tensor: Tensor, birth: Birth) -> None:
        storage = storage_of(tensor)
        self._births[storage._cdata] = (StorageWeakRef(storage), birth)  # type: ignore[no-untyped-call]

    def _birth_of_result(self, call: KernelCall, made: list[Tensor]) -> Birth:
        is_nan = any(has_nan(t) for t in made)
        parents = [
            (self._birth_of_operand(call, operand), has_nan(operand.tensor))
            for operand in call.operands()
            if is_nonfinite(operand.tensor)
        ]
        pool = [b for b, nan in parents if nan] if is_nan else []
        pool = pool or [b for b, _ in parents]
        guilty = [b for b in pool if not b.excused]
        if guilty or (pool and not is_nan):
            return min(guilty or pool, key=lambda b: b.order)
        return self._birth_of_operation(call, made, is_nan=is_nan, from_infinity=bool(pool))

    def _birth_of_operand(self, call: KernelCall, operand: Operand) -> Birth:
        if operand.memory in self._births:
            return self._births[operand.memory][1]
        return self.birth_outside(operand, call)

    def birth_outside(self, operand: Operand, call: KernelCall | None = None) -> Birth:
        """Of a tensor that was non-finite before the step, or was filled by what is not watched."""
        cause, name = self._known.get(operand.memory, ("input", ""))
        name = name or variable_of(operand.memory, self._calls.frames())
        # Collectives fill memory of the step later on; nothing else comes into a backward pass.
        unknown = operand.memory in self._made or (self.in_backward and not name)
        lost = cause == "input" and unknown
        if lost and self._first_in_backward is not None:
            return self._first_in_backward
        is_meant = is_mask(operand.tensor) or (
            cause == "buffer" and value_of(operand.tensor) == "-inf"
        )
        origin = self._origin(
            call,
            operand.tensor,
            cause=cause,
            kind="unseen" if lost else _KINDS[cause],
            tensor=name or operand.name,
            inputs=(range_of(name or operand.name, operand.tensor),),
        )
        birth = self._birth(origin, excused=is_meant and cause != "parameter")
        self._note(operand.tensor, birth)
        return birth

    def _birth_of_operation(
        self, call: KernelCall, made: list[Tensor], *, is_nan: bool, from_infinity: bool
    ) -> Birth:
        if call.is_collective:
            origin = self._origin(call, made[0], cause="input", kind="unseen", tensor="other ranks")
            return self._birth(origin, excused=False)
        constant = bool(call.constants())
        if constant and not (is_nan and any(map(math.isinf, call.constants()))):
            origin = self._origin(call, made[0], cause="operation", kind="non-finite constant")
            return self._birth(origin, excused=not is_nan)
        operands, (args, kwargs) = call.operands(), call.arguments()
        wider = not from_infinity and is_finite_when_wider(call.func, args, kwargs)
        kind = kind_of(
            call.kernel.strip("_"),
            is_nan=is_nan,
            wider_is_finite=wider,
            from_infinity=from_infinity or constant,
            zero_base=bool(operands) and has_zero(operands[0].tensor),
        )
        origin = self._origin(
            call,
            made[0],
            cause="operation",
            kind=kind,
            overflow=wider and made[0].dtype in HALF,
            inputs=tuple(
                range_of(self._known.get(o.memory, ("", o.name))[1], o.tensor) for o in operands
            ),
        )
        birth = self._birth(origin, excused=False)
        if self.in_backward and self._first_in_backward is None:
            self._first_in_backward = birth
        return birth

    def _birth(self, origin: NonFiniteOrigin, *, excused: bool) -> Birth:
        self._count += 1
        return Birth(self._count, excused, origin)

    def _origin(
        self,
        call: KernelCall | None,
        made: Tensor,
        *,
        cause: Cause,
        kind: Kind,
        overflow: bool = False,
        tensor: str = "",
        inputs: tuple[TensorRange, ...] = (),
    ) -> NonFiniteOrigin:
        site = self._calls.here()
        if call is not None and call.is_collective:
            site = Site(op=call.kernel.strip("_"), phase=site.phase)
        return NonFiniteOrigin(
            op=site.op or (kernel_name(call.kernel) if call else ""),
            kernel=str(call.func) if call else "",
            phase=site.phase,
            cause=cause,
            kind=kind,
            value=value_of(made),
            overflow=overflow,
            dtype=str(made.dtype).removeprefix("torch."),
            module=site.module,
            module_type=self._types[site.module],
            file=site.file,
            line=site.line,
            tensor=tensor,
            inputs=inputs,
        )

    def birth_of(self, tensor: Tensor) -> Birth | None:
        """Where the non-finite values in a tensor came from; None if the step did not make it."""
        found = self._births.get(storage_of(tensor)._cdata)
        return found[1] if found else None
