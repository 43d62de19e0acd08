"""A fixed, evenly spread sample of many tensors, gathered at the cost of a few cache lines each.

May import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import PLAIN, local

_BLOCKS, _BLOCK = 16, 32
"""The sample of a tensor: 16 blocks of 32 neighbours (two cache lines of fp32), evenly spread."""
_FEW = 4
"""Blocks up to which it is faster to join them one by one than to join strided views."""
_MANY = 16
"""Views of one shape and stride from which on it is fastest to join these alone."""
RECHECK = 10
"""Gathers between looks at whether tensors, or the optimizer's state, were replaced."""


class WeightSampler:
    """A fixed, evenly spread sample of a list of tensors, gathered into one flat fp32 tensor.

    Of a sharded tensor the rank's own shard is sampled; an empty one has a sum of 0.

    Args:
        tensors: what to sample; memory that they are given later is seen within `RECHECK` calls.
        blocks: blocks of 32 neighbours taken from each; smaller tensors are taken whole.
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
        self.places = sorted(range(len(tensors)), key=self._order.__getitem__)
        """Of each tensor its place in the sample."""
        self.places_there = torch.tensor(self.places, device=self.device)
        """The same, on the tensors' device."""
        sizes = [self._sizes[i] for i in self._order]
        counts = [min(n, self._most) for n in sizes]
        self._runs = [(len([*run]), count) for count, run in groupby(counts)]
        """How many tensors in a row have a sample of how many elements."""
        scale = [n / max(count, 1) for n, count in zip(sizes, counts, strict=True)]
        self._scales = torch.tensor(scale, device=self.device)
        self._weights = self._scales.repeat_interleave(torch.tensor(counts, device=self.device))
        self._addresses: list[int] = []
        self._are_views = self._are_apart = False
        self._views: list[list[Tensor]] = []

    def gather(self) -> Tensor:
        """Shape ``(elements of the sample,)``, fp32, the largest tensors first."""
        if self._calls % RECHECK == 0 or not self._are_views:
            self._look_again()
        self._calls += 1
        parts = [self._join(views) for views in self._views]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).float()

    def _look_again(self) -> None:
        """Make the views anew where a tensor was given other memory."""
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
        """Views of the samples of tensors of one size; block by block where they are few."""
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
        """Estimates of the squared norm of all the tensors together, of a sample in each row.

        Args:
            rows: shape ``(samples, elements of a sample)``.
        """
        return torch.mv(rows.square(), self._weights)

    def sums(self, flat: Tensor) -> Tensor:
        """Sum of each tensor's sample, shape ``(tensors,)``, each at its place in the sample."""
        sums = [rows.sum(1) for rows in self._rows(flat)]
        return torch.cat(sums) if len(sums) > 1 else sums[0]

    def extents(self, flat: Tensor) -> Tensor:
        """Norm of each tensor as if without its largest element, and its two largest sizes.

        Returns:
            Shape ``(3 * tensors,)``: the norms, estimated for the whole tensors; the largest sizes
            in the sample; the second largest, which are 0 where there is one element only.
        """
        found = torch.cat([_extents(rows) for rows in self._rows(flat.abs())], dim=1)
        found[0] = (found[0] * self._scales).sqrt()
        return found[:, self.places_there].reshape(-1)

    def _rows(self, flat: Tensor) -> list[Tensor]:
        """Matrices with the sample of a tensor in each row, of samples of one size each."""
        if len(self._runs) == 1:
            return [flat.view(self._runs[0])]
        parts = torch.split(flat, [count * size for count, size in self._runs])
        return [part.view(run) for part, run in zip(parts, self._runs, strict=True)]


def _extents(sizes: Tensor) -> Tensor:
    """Of each row the sum of squares without the largest number, that, and the second largest.

    Args:
        sizes: at least 0; of several equally large ones in a row one is left out.
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
