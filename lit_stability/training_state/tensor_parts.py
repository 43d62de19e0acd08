"""Finds the memory behind a tensor, which a wrapper such as a quantised weight keeps in others.

Libraries for quantisation put tensors into modules and optimizers that know few operations: a
wrapper subclass holds int8 data and scales as tensors of their own. These are copied instead. May
import torch, but not Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lit_stability.distributed.dtensor import is_wrapper, local


def parts(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors with memory that hold the content of a tensor.

    Of a sharded tensor that is this rank's shard, of a wrapper the tensors that it names in
    ``__tensor_flatten__``. There are none for a tensor without content (meta, lazy), for one that
    was made in inference mode, which cannot be written, and for a wrapper that names none.

    >>> parts(torch.zeros(2)), parts(torch.zeros(2, device="meta"))
    ([tensor([0., 0.])], [])
    """
    tensor = local(tensor)
    if is_lazy(tensor) or tensor.is_meta or tensor.is_inference():
        return []
    if not is_wrapper(tensor):
        return [tensor]
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [part for name in names for part in parts(getattr(tensor, name))]


def apart(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the tensors that can be copied themselves, and the parts of the wrappers.

    >>> apart([torch.zeros(1), torch.zeros(1, device="meta")])
    ([tensor([0.])], [])
    """
    own, inner = [], []
    for tensor in tensors:
        if is_wrapper(tensor):
            inner += parts(tensor)
        elif parts(tensor):
            own.append(tensor)
    return own, inner


def has_usual_memory(tensor: Tensor) -> bool:
    """Returns whether the elements of a tensor lie in its own memory, as torch's usual formats."""
    usual = not is_lazy(tensor) and not is_wrapper(tensor) and not tensor.is_meta
    return usual and not tensor.is_quantized and tensor.layout == torch.strided


def memory_of(tensor: Tensor) -> int:
    """Returns the bytes of the content of a tensor.

    >>> memory_of(torch.zeros(3)), memory_of(torch.eye(3).to_sparse())
    (12, 60)
    """
    return sum(_bytes(part) for part in parts(tensor))


def _bytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return _bytes(tensor.indices()) + _bytes(tensor.values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        inner = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        return sum(map(_bytes, inner))
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        inner = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
        return sum(map(_bytes, inner))
    return tensor.numel() * tensor.element_size()
