"""Which tensors can be measured: torch has kernels for some data types only. May import torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lit_stability.distributed.dtensor import is_wrapper, local

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Real formats with norms and comparisons; fp8 has neither."""


def is_measurable(tensor: Tensor) -> bool:
    """Returns whether torch computes the norm of a tensor.

    It does not for integers, booleans and fp8, such as frozen quantised weights, and not for a
    tensor of a lazy module before the first forward pass, one on the device "meta", or a sparse
    one. A frozen wrapper, such as a quantised weight, may not know the operations for it.

    >>> is_measurable(torch.zeros(2, dtype=torch.int8)), is_measurable(torch.zeros(2))
    (False, True)
    """
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    frozen_wrapper = is_wrapper(tensor) and not tensor.requires_grad
    return not frozen_wrapper and (tensor.dtype in FLOATS or tensor.dtype.is_complex)


def which_are_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Returns whether no element is NaN or infinite; True for one that cannot be measured.

    The host waits once for all of them.

    >>> which_are_finite([torch.tensor([torch.nan]), torch.tensor([1]), torch.ones(2)])
    [False, True, True]
    """
    given = list(tensors)
    found = [local(t).isfinite().all() for t in given if is_measurable(t)]
    if not found:
        return [True] * len(given)
    device = found[0].device
    answers = iter(torch.stack([f.to(device) for f in found]).tolist())
    return [not is_measurable(t) or next(answers) for t in given]
