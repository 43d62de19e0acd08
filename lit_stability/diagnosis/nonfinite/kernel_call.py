"""One call of a kernel: what went in, under which names, as it was before the call.

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
    """What a kernel does to memory."""

    is_view: bool = False
    is_blank: bool = False
    """Gives memory that was not written to yet."""
    writes: frozenset[str] = frozenset()
    """Arguments that it writes to."""
    overwrites: frozenset[str] = frozenset()
    """Those among them that it does not read."""


@lru_cache(maxsize=4096)
def traits_of(func: Any) -> Traits:
    """Read them from the kernel's schema; higher-order operators have none."""
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
    """What the kernel's schema calls it."""
    tensor: Tensor
    """As it was before the call."""
    memory: int
    """Address of its storage, which its views share."""


class KernelCall:
    """A call about to be made; `run` makes it.

    Args:
        func: the kernel, an ``OpOverload``.
        args: as it is called.
        kwargs: as it is called.
    """

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func, self._args, self._kwargs = func, args, kwargs
        self.traits = traits_of(func)
        self._before: dict[int, Tensor] = {}
        """Copies of what the call writes to, by id of the tensor."""

    def written(self) -> list[Tensor]:
        """Tensors that the call writes to."""
        names = self.traits.writes
        return [t for name, t in self._named() if name in names] if names else []

    def run(self) -> tuple[Any, list[Tensor]]:
        """What the call returns, and all tensors that it made or wrote to."""
        written = self.written()
        self._before = {id(t): t.clone() for t in written}
        out = self.func(*self._args, **self._kwargs)
        made = list(tensors_of(out))
        known = {id(t) for t in made}
        return out, made + [t for t in written if id(t) not in known]

    @property
    def kernel(self) -> str:
        """Name of the kernel without overload, such as ``_softmax``."""
        return str(getattr(self.func, "_opname", None) or self.func.__name__).split(".")[0]

    @property
    def is_collective(self) -> bool:
        """Whether the result depends on what other ranks hold."""
        return str(self.func).startswith(("c10d.", "_c10d_functional."))

    def operands(self) -> list[Operand]:
        """Tensors that the call reads, as they were before it."""
        return [
            Operand(name, self._before.get(id(t), t), storage_of(t)._cdata)
            for name, t in self._named()
            if name not in self.traits.overwrites
        ]

    def arguments(self) -> tuple[Any, Any]:
        """All arguments as they were before, to make the call once more."""
        return self._then(self._args), self._then(self._kwargs)

    def constants(self) -> list[float]:
        """NaN and Inf that the program wrote as a number."""
        values = [*self._args, *self._kwargs.values()]
        return [v for v in values if isinstance(v, float) and not math.isfinite(v)]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        schema = getattr(self.func, "_schema", None)
        names = [a.name for a in schema.arguments] if schema is not None else []
        names += [f"argument {i}" for i in range(len(names), len(self._args))]
        for name, value in [*zip(names, self._args, strict=False), *self._kwargs.items()]:
            for tensor in tensors_of(value):
                yield name, tensor

    def _then(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._before.get(id(value), value)
        if isinstance(value, dict):
            return {key: self._then(each) for key, each in value.items()}
        return [self._then(v) for v in value] if isinstance(value, (list, tuple)) else value
