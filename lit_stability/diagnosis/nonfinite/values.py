"""Properties of the elements of a tensor: finite or not, their range, mask or data.

May import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_stability.diagnosis.nonfinite.origin import TensorRange
from lit_stability.distributed.dtensor import local
from lit_stability.measurement.half_precision import HALF
from lit_stability.measurement.weight_sampling import real

_MOST_ROWS = 8
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
    torch.complex32: torch.complex64,
    torch.complex64: torch.complex128,
}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors among the arguments or results of a kernel."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)


def elements(tensor: Tensor) -> Tensor:
    """Returns the elements that this rank holds; of a sparse tensor, its values."""
    held = _held(tensor)
    return held.float() if held.is_floating_point() and held.dtype.itemsize == 1 else held


def _held(tensor: Tensor) -> Tensor:
    tensor = local(tensor).detach()
    if tensor.layout == torch.strided:
        return tensor
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Returns the storage that a tensor shares with its views."""
    return _held(tensor).untyped_storage()


def is_nonfinite(tensor: Tensor) -> bool:
    """Returns whether any element is NaN or Inf; integers never are."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return False
    numbers = elements(tensor)
    # A sum finds every NaN and Inf in one pass without a copy, but the sum itself may overflow.
    total = numbers.sum(dtype=_WIDER.get(numbers.dtype) if numbers.dtype in HALF else None)
    return not bool(torch.isfinite(total)) and not bool(torch.isfinite(numbers).all())


def has_nan(tensor: Tensor) -> bool:
    """Returns whether any element is NaN."""
    return bool(torch.isnan(elements(tensor)).any())


def has_zero(tensor: Tensor) -> bool:
    """Returns whether any element is 0."""
    return bool((elements(tensor) == 0).any())


def has_small_divisor(operands: Sequence[Tensor]) -> bool:
    """Returns whether a quotient overflows as its divisor is small, not as its dividend is large.

    Args:
        operands: dividend and divisor, or the divisor alone.

    >>> has_small_divisor([torch.ones(2), torch.tensor([1.0, 1e-40])])
    True
    >>> has_small_divisor([torch.tensor(1e38), torch.tensor(0.01)])
    False
    """
    sizes = [elements(t).abs() for t in operands]
    smallest = [float(s[s > 0].min()) for s in sizes[-1:] if bool((s > 0).any())]
    largest = [float(s.max()) for s in sizes[:-1] if s.numel()]
    return bool(smallest) and 1.0 / smallest[0] > max(largest, default=1.0)


def value_of(tensor: Tensor) -> str:
    """Returns the worst non-finite value in a tensor: ``nan``, ``inf`` or ``-inf``."""
    numbers = real(elements(tensor))
    if bool(torch.isnan(numbers).any()):
        return "nan"
    return "inf" if bool(torch.isposinf(numbers).any()) else "-inf"


def bad_rows(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Returns the few indices along the first dimension that are non-finite, and its length.

    None are returned if there are many, or no others: then single rows are not to blame.

    >>> bad_rows(torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 6.0]]))
    ((1,), 3)
    >>> bad_rows(torch.tensor(torch.inf))
    ((), 0)
    """
    numbers = elements(tensor)
    if numbers.ndim == 0 or numbers.shape != tensor.shape:  # the values of a sparse tensor
        return (), 0
    bad = ~torch.isfinite(numbers).flatten(1).all(1) if numbers.ndim > 1 else ~numbers.isfinite()
    count = int(bad.sum())
    few = count <= _MOST_ROWS and count < len(numbers)
    return tuple(bad.nonzero()[:, 0].tolist()) if few else (), len(numbers)


def is_mask(tensor: Tensor) -> bool:
    """Returns whether a tensor contains only infinities and 0, as a mask for scores does."""
    numbers = real(elements(tensor))
    zeros = numbers == 0
    is_made_of_them = bool((zeros | torch.isinf(numbers)).all())
    return is_made_of_them and (numbers.numel() == 1 or bool(zeros.any()))


def range_of(name: str, tensor: Tensor) -> TensorRange:
    """Returns shape, data type, range of the finite elements, and number of non-finite ones."""
    numbers = real(elements(tensor))
    finite = numbers[torch.isfinite(numbers)]
    low, high = (float(v) for v in torch.aminmax(finite)) if finite.numel() else (None, None)
    return TensorRange(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        minimum=low,
        maximum=high,
        nonfinite=numbers.numel() - finite.numel(),
    )


def is_finite_when_wider(func: Any, args: Any, kwargs: Any) -> bool:
    """Returns whether a kernel's result is finite in the next wider data type."""
    if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
        return False
    try:
        with torch._C._DisableAutocast(), torch.no_grad():
            out = func(*_widened(args), **_widened(kwargs))
    except (RuntimeError, TypeError):  # not every kernel supports every data type
        return False
    return not any(is_nonfinite(t) for t in tensors_of(out))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDER.get(value.dtype, value.dtype))
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    return type(value)(_widened(v) for v in value) if isinstance(value, (list, tuple)) else value
