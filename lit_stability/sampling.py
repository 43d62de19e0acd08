"""A fixed, evenly spread sample of many tensors, gathered at the cost of a few cache lines each.

May import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_stability.shards import local

_BLOCKS, _BLOCK = 16, 32
"""The sample of a tensor: 16 blocks of 32 neighbours (two cache lines of fp32), evenly spread."""
_FEW = 4
"""Blocks up to which it is faster to join them one by one than to join strided views."""
RECHECK = 10
"""Gathers between looks at whether tensors, or the optimizer's state, were replaced."""


class Samples:
    """A fixed, evenly spread sample of a list of tensors, gathered into one flat fp32 tensor.

    Of a sharded tensor the rank's own shard is sampled; an empty one has a sum of 0.

    Args:
        tensors: what to sample; memory that they are given later is seen within `RECHECK` calls.
        blocks: blocks of 32 neighbours taken from each; smaller tensors are taken whole.
    """

    def __init__(self, tensors: Sequence[Tensor], blocks: int = _BLOCKS) -> None:
        self._tensors = list(tensors)
        self._calls = 0
        self._blocks, most = blocks, blocks * _BLOCK
        tensors = [_detached(t) for t in tensors]
        self.device = tensors[0].device
        large = [i for i, t in enumerate(tensors) if t.numel() > most]
        small = [i for i, t in enumerate(tensors) if t.numel() <= most]
        self._large, self._small = large, small
        order = [*large, *small]
        self._back = torch.tensor(order, device=self.device).argsort()
        counts = [min(tensors[i].numel(), most) for i in order]
        self._lengths = torch.tensor(counts, device=self.device)
        scale = [tensors[i].numel() / max(n, 1) for i, n in zip(order, counts, strict=True)]
        self._scales = torch.tensor(scale, device=self.device)
        self._weights = self._scales.repeat_interleave(self._lengths)
        self._addresses: list[int] = []
        self._are_views = False
        self._views: tuple[list[Tensor], list[Tensor]] = ([], [])

    def gather(self) -> Tensor:
        """Shape ``(elements of the sample,)``, fp32, the large tensors first."""
        if self._calls % RECHECK == 0 or not self._are_views:
            self._look_again()
        self._calls += 1
        parts = [self._join(views) for views in self._views if views]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).float()

    def _look_again(self) -> None:
        """Make the views anew where a tensor was given other memory."""
        addresses = [local(t).data_ptr() for t in self._tensors]
        if addresses == self._addresses and self._are_views:
            return
        self._addresses = addresses
        tensors = [_detached(t) for t in self._tensors]
        self._are_views = all(_is_dense(t) for t in tensors)
        self._views = (
            self._rows([blocks_of(tensors[i], self._blocks) for i in self._large]),
            [blocks_of(tensors[i], 1, tensors[i].numel())[0] for i in self._small],
        )

    def _rows(self, views: list[Tensor]) -> list[Tensor]:
        """Block by block where a tensor has few: neighbours are joined by a plain copy."""
        return [row for v in views for row in v] if self._blocks <= _FEW else views

    def _join(self, views: Sequence[Tensor]) -> Tensor:
        if any(v.device != self.device for v in views):
            views = [v.to(self.device) for v in views]
        return torch.cat(list(views)).reshape(-1)

    def weighted_square_sum(self, flat: Tensor) -> Tensor:
        """Estimate of the squared norm of all the tensors together, a scalar."""
        return torch.dot(flat * self._weights, flat)

    def sums(self, flat: Tensor) -> Tensor:
        """Sum of each tensor's sample, shape ``(tensors,)``, in the tensors' order."""
        # `unsafe` leaves out a check of the lengths, which would copy to the host twice.
        sums = torch.segment_reduce(flat, "sum", lengths=self._lengths, unsafe=True)
        return sums[self._back]

    def extents(self, flat: Tensor) -> Tensor:
        """Norm of each tensor as if without its largest element, and its two largest sizes.

        Returns:
            Shape ``(3 * tensors,)``: the norms, estimated for the whole tensors; the largest sizes
            in the sample; the second largest, which are 0 where there is one element only.
        """
        n = self._lengths
        sizes = flat.abs()
        first = torch.segment_reduce(sizes, "max", lengths=n, unsafe=True, initial=0.0)
        is_first = sizes == first.repeat_interleave(n, output_size=len(flat))
        rest = sizes.masked_fill(is_first, 0.0)
        second = torch.segment_reduce(rest, "max", lengths=n, unsafe=True, initial=0.0)
        count = torch.segment_reduce(is_first.float(), "sum", lengths=n, unsafe=True)
        again = (count - 1).clamp(min=0) * first.square()
        squares = torch.segment_reduce(rest.square(), "sum", lengths=n, unsafe=True) + again
        norms = (squares * self._scales).sqrt()
        second = torch.where(count > 1, first, second)
        return torch.cat([part[self._back] for part in (norms, first, second)])


def blocks_of(tensor: Tensor, blocks: int = _BLOCKS, block: int = _BLOCK) -> Tensor:
    """An evenly spread sample, shape ``(blocks, block)``; a view if the tensor is dense."""
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided((blocks, block), (tensor.numel() // blocks, 1))


def _detached(tensor: Tensor) -> Tensor:
    return real(local(tensor).detach())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()


def real(tensor: Tensor) -> Tensor:
    """The tensor, or its real and imaginary parts side by side, which have the same norm."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
