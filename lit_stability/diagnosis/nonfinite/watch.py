"""Watches every kernel of a step for new non-finite values, and tracks where they come from.

A non-finite value inherits the source of the values that it was computed from, so the source of
whatever reaches the loss is known after the step. If several sources meet:

* A NaN comes from the NaNs among the inputs, else from the Infs; an Inf from any non-finite input.
* An Inf that is there on purpose (a constant, a mask of -inf) is *intended*: it is passed on, but
  if a NaN is made from intended values alone, the operation that makes it is the source.
* The earliest source counts.

May import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stability.diagnosis.nonfinite.call_sites import CallSites, Site, kernel_name
from lit_stability.diagnosis.nonfinite.kernel_call import KernelCall, Operand, traits_of
from lit_stability.diagnosis.nonfinite.kinds import Facts, Kind, kind_of, kind_of_constant
from lit_stability.diagnosis.nonfinite.origin import Cause, NonFiniteOrigin, TensorRange
from lit_stability.diagnosis.nonfinite.source_lines import lines_around
from lit_stability.diagnosis.nonfinite.values import (
    bad_rows,
    has_nan,
    has_small_divisor,
    has_zero,
    is_finite_when_wider,
    is_mask,
    is_nonfinite,
    range_of,
    storage_of,
    value_of,
)
from lit_stability.diagnosis.nonfinite.variables import attributes_of, is_argument, variable_of
from lit_stability.measurement.half_precision import HALF
from lit_stability.training_state.isolated_model import IsolatedModel

_LITERAL = torch.ops.aten.lift_fresh.default
"""Called on each tensor that the program makes of plain numbers."""
_KINDS: dict[Cause, Kind] = {
    "input": "non-finite input",
    "parameter": "non-finite parameter",
    "buffer": "non-finite buffer",
    "constant": "non-finite constant",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where non-finite values came from; a smaller ``order`` is earlier."""

    order: int
    intended: bool
    origin: NonFiniteOrigin


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Checks the result of every kernel, forward and backward, while it is entered.

    Args:
        model: provides the names of parameters and buffers.
        calls: provides the current place in the program.
        state: copies what the step writes to and did not make itself.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, calls: CallSites, state: IsolatedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls, self._state = calls, state
        self._types = {path: type(m).__name__ for path, m in model.named_modules()}
        self._known: dict[int, tuple[Cause, str]] = {}
        for name, tensor in attributes_of(model):
            self._known[storage_of(tensor)._cdata] = ("constant", name)
        for name, tensor in model.named_buffers():
            self._known[storage_of(tensor)._cdata] = ("buffer", name)
        for name, tensor in model.named_parameters():
            self._known[storage_of(tensor)._cdata] = ("parameter", name)
        # A weak reference keeps the address from being reused, but does not keep the memory alive.
        self._made: dict[int, StorageWeakRef] = {}
        self._sources: dict[int, tuple[StorageWeakRef, Source]] = {}
        self._count = 0
        self._sums: dict[int, int] = {}
        """Memory of a sum -> order of the exponential in it that has overflowed."""
        self._softmaxes: set[int] = set()
        """Orders of the exponentials that are divided by their sum."""
        self.in_backward = False
        self._first_in_backward: Source | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a kernel and checks its result."""
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits.is_view:
            out = func(*args, **kwargs)
            if func is _LITERAL and is_nonfinite(out):
                self._note_literal(out)
            return out
        call = KernelCall(func, args, kwargs)
        for tensor in call.written():
            if storage_of(tensor)._cdata not in self._made:
                self._state.copy_memory(tensor)
        out, made = call.run()
        if not traits.is_blank:
            self._check(call, made)
        if not traits.writes:
            self._remember(call, made)
        return out

    def _remember(self, call: KernelCall, made: list[Tensor]) -> None:
        for tensor in made:
            storage = storage_of(tensor)
            if storage._cdata not in self._made:
                self._made[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            if call.kernel == "_to_copy":  # a cast of a parameter has its name
                known = self._known.get(call.operands()[0].memory)
                if known is not None:
                    self._known[storage._cdata] = known

    def _check(self, call: KernelCall, made: list[Tensor]) -> None:
        bad = [t for t in made if is_nonfinite(t)]
        if bad:
            source = self._source_of_result(call, bad)
            for tensor in bad:
                self._note(tensor, source)

    def _note(self, tensor: Tensor, source: Source) -> None:
        storage = storage_of(tensor)
        self._sources[storage._cdata] = (StorageWeakRef(storage), source)  # type: ignore[no-untyped-call]

    def _source_of_result(self, call: KernelCall, made: list[Tensor]) -> Source:
        is_nan = any(has_nan(t) for t in made)
        parents = [
            (self._source_of_operand(call, operand), has_nan(operand.tensor))
            for operand in call.operands()
            if is_nonfinite(operand.tensor)
        ]
        pool = [s for s, nan in parents if nan] if is_nan else []
        self._follow_sums(call, made, [s for s, _ in parents])
        pool = pool or [s for s, _ in parents]
        unintended = [s for s in pool if not s.intended]
        if unintended or (pool and not is_nan):
            return min(unintended or pool, key=lambda s: s.order)
        return self._source_of_operation(call, made, is_nan=is_nan, from_infinity=bool(pool))

    def _note_literal(self, made: Tensor) -> None:
        kind = kind_of_constant(self._calls.here().op, is_nan=has_nan(made))
        origin = self._origin(None, made, cause="operation", kind=kind)
        self._note(made, self._new_source(origin, intended=not has_nan(made)))

    def _follow_sums(self, call: KernelCall, made: list[Tensor], parents: list[Source]) -> None:
        """Records exponentials that are added up and then are a divisor, or argument of a log."""
        exponentials = [s for s in parents if "exp" in s.origin.op and s.origin.kind == "overflow"]
        if call.kernel == "sum" and exponentials:
            self._sums |= {storage_of(t)._cdata: exponentials[0].order for t in made}
        elif call.kernel in ("div", "log"):
            divisor = call.operands()[-1].memory
            if divisor in self._sums:
                self._softmaxes |= {self._sums[divisor], *(s.order for s in exponentials)}

    def origin_of(self, source: Source) -> NonFiniteOrigin:
        """Returns the origin of a source, with all that was seen since it was noted."""
        origin = source.origin
        return (
            replace(origin, kind="softmax overflow") if source.order in self._softmaxes else origin
        )

    def _source_of_operand(self, call: KernelCall, operand: Operand) -> Source:
        if operand.memory in self._sources:
            return self._sources[operand.memory][1]
        return self.source_outside(operand, call)

    def source_outside(self, operand: Operand, call: KernelCall | None = None) -> Source:
        """Returns the source of a tensor that no watched kernel has made non-finite."""
        cause, name = self._known.get(operand.memory, ("input", ""))
        if cause == "constant" and is_argument(operand.memory, self._calls.frames()):
            cause, name = "input", ""  # a batch that the module keeps
        name = name or variable_of(operand.memory, self._calls.frames())
        # Collectives fill memory of the step later; a backward pass has no other unknown input.
        unknown = operand.memory in self._made or (self.in_backward and not name)
        lost = cause == "input" and unknown
        if lost and self._first_in_backward is not None:
            return self._first_in_backward
        is_meant = _is_meant(cause, operand.tensor)
        origin = self._origin(
            call,
            operand.tensor,
            cause=cause,
            kind="unseen" if lost else _KINDS[cause],
            tensor=name or operand.name,
            inputs=(range_of(name or operand.name, operand.tensor),),
        )
        source = self._new_source(origin, intended=is_meant)
        self._note(operand.tensor, source)
        return source

    def _source_of_operation(
        self, call: KernelCall, made: list[Tensor], *, is_nan: bool, from_infinity: bool
    ) -> Source:
        if call.is_collective:
            origin = self._origin(call, made[0], cause="input", kind="unseen", tensor="other ranks")
            return self._new_source(origin, intended=False)
        constant = bool(call.constants())
        if constant and not (is_nan and any(map(math.isinf, call.constants()))):
            kind = kind_of_constant(self._calls.here().op, is_nan=is_nan)
            origin = self._origin(call, made[0], cause="operation", kind=kind)
            return self._new_source(origin, intended=not is_nan)
        operands, (args, kwargs) = call.operands(), call.arguments()
        wider = not from_infinity and is_finite_when_wider(call.func, args, kwargs)
        kind = kind_of(
            Facts(
                kernel=call.kernel.strip("_"),
                op=self._calls.here().op,
                backward=self.in_backward,
                is_nan=is_nan,
                half=made[0].dtype in HALF,
                wider_is_finite=wider,
                from_infinity=from_infinity or constant,
                zero_base=bool(operands) and has_zero(operands[0].tensor),
                small_divisor=wider and _divides_by_small(call, operands),
            )
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
        source = self._new_source(origin, intended=False)
        if self.in_backward and self._first_in_backward is None:
            self._first_in_backward = source
        return source

    def _new_source(self, origin: NonFiniteOrigin, *, intended: bool) -> Source:
        self._count += 1
        return Source(self._count, intended, origin)

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
        samples, batch_size = bad_rows(made)
        source_line, source = lines_around(site.file, site.line)
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
            samples=samples,
            batch_size=batch_size,
            source=source,
            source_line=source_line,
        )

    def source_of(self, tensor: Tensor) -> Source | None:
        """Returns the source of a tensor's non-finite values; None if no watched kernel made it."""
        found = self._sources.get(storage_of(tensor)._cdata)
        return found[1] if found else None


def _divides_by_small(call: KernelCall, operands: list[Operand]) -> bool:
    """Returns whether a division overflows because of its divisor."""
    divides = call.kernel.startswith(("div", "reciprocal", "rsqrt"))
    return divides and has_small_divisor([operand.tensor for operand in operands])


def _is_meant(cause: Cause, tensor: Tensor) -> bool:
    """Returns whether the infinities of a tensor from before the step are there on purpose."""
    if cause == "parameter":
        return False
    if cause == "input":
        return is_mask(tensor)
    # A single weight of inf, as of a class without samples, is no mask.
    return value_of(tensor) == "-inf" or (is_mask(tensor) and has_zero(tensor))
