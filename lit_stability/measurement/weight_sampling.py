"""Gathers a fixed, evenly spread sample of many tensors, a few cache lines of each.

May import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import PLAIN, local

_BLOCKS, _BLOCK = 16, 32
"""Sample of a tensor: 16 evenly spread blocks of 32 neighbours (two cache lines of fp32)."""
_FEW = 4
"""Blocks up to which joining single blocks is faster than joining strided views."""
_MANY = 16
"""Number of equal views (shape and stride) from which it is fastest to join them separately."""
RECHECK = 10
"""Gathers between checks whether tensors, or the optimizer's state, were replaced."""


class WeightSampler:
    """Gathers a fixed, evenly spread sample of a list of tensors into one flat fp32 tensor.

    Of a sharded tensor it samples the rank's own shard; an empty shard has a sum of 0.

    Args:
        tensors: tensors to sample; new memory of a tensor is noticed within `RECHECK` calls.
        blocks: blocks of 32 neighbours per tensor; smaller tensors are used whole.
    """

    def __init__(self, tensors: Sequence[Tensor], blocks: int = _BLOCKS) -> None:
        self._tensors = list(tensors)
        self._are_plain = set(map(type, self._tensors)) <= PLAIN
        self._calls = 0
        self._blocks, self._most = blocks, blocks * _BLOCK
        tensors = [_detached(t) for t in tensors]
        self.device = tensors[0].device
        self._sizes = [t.numel() for t in tensors]
        self._order = sorted(range(len(tensors)), key=lambda i: -self._sizes[i])
        self.positions = sorted(range(len(tensors)), key=self._order.__getitem__)
        """Position of each tensor in the sample."""
        self.positions_on_device = torch.tensor(self.positions, device=self.device)
        """``positions`` on the device of the tensors."""
        sizes = [self._sizes[i] for i in self._order]
        counts = [min(n, self._most) for n in sizes]
        self._runs = [(len([*run]), count) for count, run in groupby(counts)]
        """Runs of consecutive tensors with equal samples: number of tensors, elements of each."""
        scale = [n / max(count, 1) for n, count in zip(sizes, counts, strict=True)]
        self._scales = torch.tensor(scale, device=self.device)
        self._weights = self._scales.repeat_interleave(torch.tensor(counts, device=self.device))
        self._addresses: list[int] = []
        self._are_views = self._are_apart = False
        self._views: list[list[Tensor]] = []

    def gather(self) -> Tensor:
        """Returns the sample, fp32 of shape ``(elements,)``, the largest tensors first."""
        if self._calls % RECHECK == 0 or not self._are_views:
            self._refresh()
        self._calls += 1
        parts = [self._join(views) for views in self._views]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).float()

    def recheck(self) -> None:
        """Has the next `gather` look whether a tensor has got other memory."""
        self._calls = 0

    def _refresh(self) -> None:
        """Creates the views again if a tensor has got other memory."""
        own = self._tensors if self._are_plain else [local(t) for t in self._tensors]
        addresses = [t.data_ptr() for t in own]
        if addresses == self._addresses and self._are_views:
            return
        self._addresses = addresses
        tensors = [_detached(self._tensors[i]) for i in self._order]
        self._are_views = all(_is_dense(t) for t in tensors)
        self._are_apart = any(t.device != self.device for t in tensors)
        self._views = []
        alone = True
        for size, group in groupby(tensors, key=Tensor.numel):
            run = [*group]
            views = self._sampled(size, run)
            was_alone, alone = alone, len(run) >= _MANY
            if was_alone or alone or self._views[-1][0].dim() != views[0].dim():
                self._views.append(views)
            else:
                self._views[-1] += views

    def _sampled(self, size: int, tensors: list[Tensor]) -> list[Tensor]:
        """Returns views of the samples of equally large tensors; single blocks if they are few."""
        if size <= self._most:
            return [blocks_of(t, 1, size)[0] for t in tensors]
        views = [blocks_of(t, self._blocks) for t in tensors]
        if len(views) < _MANY and self._blocks <= _FEW:
            return [row for v in views for row in v]
        return views

    def _join(self, views: list[Tensor]) -> Tensor:
        if self._are_apart:
            views = [v.to(self.device) for v in views]
        return torch.cat(views).reshape(-1)

    def square_sums(self, rows: Tensor) -> Tensor:
        """Estimates the squared norm of all tensors together, from one sample per row.

        Args:
            rows: shape ``(samples, elements of a sample)``.
        """
        return torch.mv(rows.square(), self._weights)

    def sums(self, flat: Tensor) -> Tensor:
        """Returns the sum of each tensor's sample, shape ``(tensors,)``, in sample order."""
        sums = [rows.sum(1) for rows in self._rows(flat)]
        return torch.cat(sums) if len(sums) > 1 else sums[0]

    def tensor_square_sums(self, flat: Tensor) -> Tensor:
        """Estimates the squared norm of each tensor, shape ``(tensors,)``, in their order."""
        sums = self.sums(flat.square()) * self._scales
        return sums[self.positions_on_device]

    def extents(self, flat: Tensor) -> Tensor:
        """Returns norms without the largest element, and the two largest absolute values.

        Returns:
            Shape ``(3 * tensors,)``: the norms, estimated for the whole tensors; the largest
            absolute values in the sample; the second largest, 0 for a single element.
        """
        extents = torch.cat([_extents(rows) for rows in self._rows(flat.abs())], dim=1)
        extents[0] = (extents[0] * self._scales).sqrt()
        return extents[:, self.positions_on_device].reshape(-1)

    def _rows(self, flat: Tensor) -> list[Tensor]:
        """Splits a sample into matrices with one tensor per row, one matrix per sample size."""
        if len(self._runs) == 1:
            return [flat.view(self._runs[0])]
        parts = torch.split(flat, [count * size for count, size in self._runs])
        return [part.view(run) for part, run in zip(parts, self._runs, strict=True)]


def _extents(sizes: Tensor) -> Tensor:
    """Returns per row the sum of squares without the largest value, that value, the second largest.

    Args:
        sizes: absolute values; of several equal largest ones in a row only one is excluded.
    """
    if not sizes.shape[1]:
        return sizes.new_zeros(3, len(sizes))
    first = sizes.amax(1)
    is_first = sizes == first[:, None]
    rest = sizes.masked_fill(is_first, 0.0)
    count = is_first.sum(1)
    squares = rest.square().sum(1) + (count - 1).clamp(min=0) * first.square()
    return torch.stack([squares, first, torch.where(count > 1, first, rest.amax(1))])


def blocks_of(tensor: Tensor, blocks: int = _BLOCKS, block: int = _BLOCK) -> Tensor:
    """Returns an evenly spread sample, shape ``(blocks, block)``; a view of a dense tensor."""
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided((blocks, block), (tensor.numel() // blocks, 1))


def _detached(tensor: Tensor) -> Tensor:
    return real(local(tensor).detach())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a contiguous range of memory, in any order."""
    if tensor.is_contiguous():
        return True
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()


def real(tensor: Tensor) -> Tensor:
    """Returns a real view of a complex tensor, which has the same norm; others unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
