"""One call of a kernel: its arguments by name, as they were before the call.

May import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from lit_stability.diagnosis.nonfinite.values import storage_of, tensors_of


@dataclass(frozen=True, slots=True)
class Traits:
    """How a kernel uses memory."""

    is_view: bool = False
    is_blank: bool = False
    """Whether it returns uninitialised memory."""
    writes: frozenset[str] = frozenset()
    """Names of arguments that it writes to."""
    overwrites: frozenset[str] = frozenset()
    """Names of arguments that it writes to without reading them."""


@lru_cache(maxsize=4096)
def traits_of(func: Any) -> Traits:
    """Returns the traits from the kernel's schema; higher-order operators have no schema."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return Traits()
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    overwrites = {a.name for a in written if a.is_out}
    name = schema.name.removeprefix("aten::")
    if name in ("copy_", "fill_", "zero_"):
        overwrites.add("self")
    return Traits(
        is_view=func.is_view,
        is_blank=name.removeprefix("new_").startswith("empty"),
        writes=frozenset(a.name for a in written),
        overwrites=frozenset(overwrites),
    )


class Operand(NamedTuple):
    """A tensor that a kernel reads."""

    name: str
    """Name of the argument in the kernel's schema."""
    tensor: Tensor
    """The tensor, or its copy from before the call if the kernel wrote to it."""
    memory: int
    """Address of its storage, which it shares with its views."""


class KernelCall:
    """A call of a kernel, made by `run`.

    Args:
        func: the kernel, an ``OpOverload``.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func, self._args, self._kwargs = func, args, kwargs
        self.traits = traits_of(func)
        self._before: dict[int, Tensor] = {}
        """Id of a tensor that the call writes to -> copy from before the call."""

    def written(self) -> list[Tensor]:
        """Returns the tensors that the call writes to."""
        names = self.traits.writes
        return [t for name, t in self._named() if name in names] if names else []

    def run(self) -> tuple[Any, list[Tensor]]:
        """Makes the call; returns its result, and all tensors that it made or wrote to."""
        written = self.written()
        self._before = {id(t): t.clone() for t in written}
        out = self.func(*self._args, **self._kwargs)
        made = list(tensors_of(out))
        known = {id(t) for t in made}
        return out, made + [t for t in written if id(t) not in known]

    @property
    def kernel(self) -> str:
        """Name of the kernel without its overload, such as ``_softmax``."""
        return str(getattr(self.func, "_opname", None) or self.func.__name__).split(".")[0]

    @property
    def is_collective(self) -> bool:
        """Whether the result depends on other ranks."""
        return str(self.func).startswith(("c10d.", "_c10d_functional."))

    def operands(self) -> list[Operand]:
        """Returns the tensors that the call reads, as they were before it."""
        return [
            Operand(name, self._before.get(id(t), t), storage_of(t)._cdata)
            for name, t in self._named()
            if name not in self.traits.overwrites
        ]

    def arguments(self) -> tuple[Any, Any]:
        """Returns all arguments as they were before, to repeat the call."""
        return self._before_call(self._args), self._before_call(self._kwargs)

    def constants(self) -> list[float]:
        """Returns the NaN and Inf among the plain numbers of the arguments."""
        values = [*self._args, *self._kwargs.values()]
        return [v for v in values if isinstance(v, float) and not math.isfinite(v)]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        schema = getattr(self.func, "_schema", None)
        names = [a.name for a in schema.arguments] if schema is not None else []
        names += [f"argument {i}" for i in range(len(names), len(self._args))]
        for name, value in [*zip(names, self._args, strict=False), *self._kwargs.items()]:
            for tensor in tensors_of(value):
                yield name, tensor

    def _before_call(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._before.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._before_call(v) for key, v in value.items()}
        return [self._before_call(v) for v in value] if isinstance(value, (list, tuple)) else value
