"""The description of an operation that made a NaN or Inf.

Imports neither torch nor Lightning.
"""

from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from lit_stability.diagnosis.nonfinite.advice import advise
from lit_stability.diagnosis.nonfinite.kinds import Kind

Phase = Literal["forward", "backward"]
Cause = Literal["input", "parameter", "buffer", "constant", "operation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """An input tensor of the operation, with the range of its values."""

    name: str
    """Name of the parameter or variable, else the name of the kernel's argument."""
    shape: tuple[int, ...]
    dtype: str
    minimum: float | None
    """Smallest finite element (of real and imaginary parts); None if there is none."""
    maximum: float | None
    """Largest finite element."""
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

    >>> import torch
    >>> from lit_stability import locate_nonfinite
    >>> model = torch.nn.Linear(2, 1)
    >>> origin = locate_nonfinite(model, lambda: model(torch.zeros(1, 2)).abs().sum().sub(9).log())
    >>> origin.op, origin.phase
    ('log', 'forward')
    """

    op: str
    """Name in the program: ``log``, ``softmax``, ``linear``; in the backward pass, the operation of
    the forward pass whose gradient is computed."""
    kernel: str
    """The ATen kernel, such as ``aten._softmax.default``."""
    phase: Phase
    """``forward`` if the loss is non-finite, ``backward`` if only gradients are."""
    cause: Cause
    """``operation``: its inputs were finite, or contained an Inf on purpose. Else the values were
    non-finite before the step: a ``parameter``, a ``buffer``, a ``constant`` (a plain tensor that
    is an attribute of a module), or an ``input`` (any other tensor, also one from another rank)."""
    kind: Kind
    """Kind of numerical error; see `Kind`."""
    value: str
    """Value it made: ``nan``, ``inf`` or ``-inf``."""
    overflow: bool
    """Whether the same operation on the same inputs is finite in float32 but not in ``dtype``."""
    dtype: str
    """Data type of the result, such as ``float16``."""
    module: str
    """Path of the innermost module, for ``model.get_submodule``; "" for the model's own code and
    for code outside of its modules, such as the loss."""
    module_type: str
    file: str
    """Source file of ``line``; "" if the step calls only torch."""
    line: int
    """The innermost line outside of torch and this package; in the backward pass, the line of the
    forward operation, or the line inside a custom ``backward``."""
    tensor: str = ""
    """Parameter, buffer, constant or input that was non-finite before the step; "" for an
    operation."""
    inputs: tuple[TensorRange, ...] = ()
    samples: tuple[int, ...] = ()
    """Indices along the first dimension of the result that are non-finite, if these are few. For a
    step of a Trainer they are kept only where that is the dimension of the batch."""
    batch_size: int = 0
    """Length of that dimension; 0 if it is not known."""
    digests: tuple[int, ...] = ()
    """Checksum of each of the samples, by which it is recognised in another batch."""
    note: str = ""
    """Remark: compiled parts were run eagerly, or the loss is finite."""
    source: str = field(default="", repr=False)
    """``line`` and up to three lines on either side as they were at that time; "" if unreadable."""
    source_line: int = 0
    """Number of the first line of ``source``."""

    @property
    def advice(self) -> str:
        """What to try, in one sentence."""
        return advise(
            self.kind,
            self.op,
            self.module_type,
            self.phase,
            overflow=self.overflow,
            kernel=self.kernel,
        )

    def describe(self) -> str:
        """Returns two lines for a log: operation, place and reason; and what to try."""
        module = f"{self.module} ({self.module_type})" if self.module else self.module_type
        where = f", {PurePath(self.file).name}:{self.line}" if self.file else ""
        text = f"{self.op} made {self.value} in {module}{where}, {self.phase} pass: {self._why()}"
        ranges = "; ".join(str(tensor) for tensor in self.inputs[:3])
        text += f"; {ranges}" if ranges else ""
        text += f" ({self.note})" if self.note else ""
        return f"{text}\n  try: {self.advice}"

    __str__ = describe

    def _why(self) -> str:
        if self.overflow:
            return f"overflow of {self.dtype}, finite in float32"
        return f"{self.kind} {self.tensor}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields and the advice as JSON types, without the samples."""
        plain = asdict(self) | {"advice": self.advice}
        for name in ("samples", "batch_size", "digests"):
            del plain[name]
        plain["inputs"] = [r | {"shape": list(r["shape"])} for r in plain["inputs"]]
        return plain
