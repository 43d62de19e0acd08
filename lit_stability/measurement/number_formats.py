"""Which tensors can be measured: torch has kernels for some data types only. May import torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Real formats with norms and comparisons; fp8 has neither."""


def is_measurable(tensor: Tensor) -> bool:
    """Returns whether torch computes the norm of a tensor.

    It does not for integers, booleans and fp8, such as frozen quantised weights, and not for a
    tensor of a lazy module before the first forward pass.

    >>> is_measurable(torch.zeros(2, dtype=torch.int8)), is_measurable(torch.zeros(2))
    (False, True)
    """
    return not is_lazy(tensor) and (tensor.dtype in FLOATS or tensor.dtype.is_complex)


def all_finite(tensor: Tensor) -> bool:
    """Returns whether no element is NaN or infinite; True for one that cannot be measured.

    >>> all_finite(torch.tensor([1.0, torch.nan])), all_finite(torch.tensor([1, 2]))
    (False, True)
    """
    return not is_measurable(tensor) or bool(tensor.isfinite().all())
