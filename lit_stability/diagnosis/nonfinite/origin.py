"""What is told of the operation in which a NaN or Inf was born.

Data only: imports neither torch nor Lightning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Literal

from lit_stability.diagnosis.nonfinite.advice import Kind, advise

Phase = Literal["forward", "backward"]
Cause = Literal["input", "parameter", "buffer", "operation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """One tensor that went into the operation: its name, its shape, and the range of its values."""

    name: str
    """The parameter's or the variable's name; else what the kernel calls it."""
    shape: tuple[int, ...]
    dtype: str
    minimum: float | None
    """Smallest finite element (of real and imaginary parts), None where there is none."""
    maximum: float | None
    nonfinite: int
    """Number of elements that are NaN or Inf."""

    def __str__(self) -> str:
        text = f"{self.name} {self.dtype}{list(self.shape)}"
        if self.minimum is not None:
            text += f" in [{self.minimum:.4g}, {self.maximum:.4g}]"
        return text + (f", {self.nonfinite} non-finite" if self.nonfinite else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFiniteOrigin:
    """The first operation that made a non-finite value which reached the loss or a gradient.

    ``op``, ``module``, ``file`` and ``line`` say where, ``phase`` in which pass, ``cause`` by what,
    ``inputs`` what went in; `describe` says it in words and ``advice`` what to try.
    """

    op: str
    """As the program calls it: ``log``, ``softmax``, ``linear``; in the backward pass the
    operation of the forward pass whose gradient it is."""
    kernel: str
    """The ATen kernel that was seen to do it, such as ``aten._softmax.default``."""
    phase: Phase
    """``forward`` if the loss is non-finite, ``backward`` if it is finite and gradients are not."""
    cause: Cause
    """``operation``: all that went in was finite, or an Inf put there on purpose. Else the values
    were bad before the step: a ``parameter``, a ``buffer``, or an ``input`` (any other tensor, also
    one that another rank sent)."""
    kind: Kind
    """What went wrong: see `Kind`."""
    value: str
    """What it made: ``nan``, ``inf`` or ``-inf``."""
    overflow: bool
    """Whether the same operation on the same inputs is finite in float32, and not in ``dtype``."""
    dtype: str
    """Format of the result, such as ``float16``."""
    module: str
    """Path of the innermost module, for ``model.get_submodule``; "" for the model's own code and
    all that runs outside its modules, such as the loss."""
    module_type: str
    file: str
    """Source file of the line below; "" where the step calls nothing but torch."""
    line: int
    """The deepest line that is neither torch's nor this package's; in the backward pass that of
    the forward operation, or the line inside a custom ``backward``."""
    tensor: str = ""
    """The parameter, buffer or input that was non-finite before; "" for an operation."""
    inputs: tuple[TensorRange, ...] = ()
    note: str = ""
    """What else there is to know: parts run eagerly, a value that the loss did not take."""

    @property
    def advice(self) -> str:
        """What to try, in one sentence."""
        return advise(self.kind, self.op, self.module_type, self.phase, overflow=self.overflow)

    def describe(self) -> str:
        """Two lines for a log: what, where and why; and what to try."""
        module = f"{self.module} ({self.module_type})" if self.module else self.module_type
        where = f", {PurePath(self.file).name}:{self.line}" if self.file else ""
        text = f"{self.op} made {self.value} in {module}{where}, {self.phase} pass: {self._why()}"
        ranges = "; ".join(str(each) for each in self.inputs[:3])
        text += f"; {ranges}" if ranges else ""
        text += f" ({self.note})" if self.note else ""
        return f"{text}\n  try: {self.advice}"

    __str__ = describe

    def _why(self) -> str:
        if self.overflow:
            return f"overflow of {self.dtype}, finite in float32"
        return f"{self.kind} {self.tensor}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the advice among them."""
        plain = asdict(self) | {"advice": self.advice}
        plain["inputs"] = [r | {"shape": list(r["shape"])} for r in plain["inputs"]]
        return plain
