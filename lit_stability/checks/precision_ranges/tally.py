"""Counts the magnitudes of tensors on their own device, without copies to the host.

May import torch.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from lit_stability.checks.precision_ranges.bins import EDGES, N_BINS
from lit_stability.checks.precision_ranges.report import Kind, RangeRow
from lit_stability.measurement.norms import dense

_CHUNK = 2**22
"""Elements counted at once; counting needs three times the memory of these, not of the tensor."""


@cache
def _edges(device: torch.device) -> Tensor:
    return torch.tensor(EDGES, dtype=torch.float32, device=device)


class Tally:
    """Counts the magnitudes of one kind of value in one layer, over tensors and batches."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._smallest = self._largest = torch.tensor(0.0)

    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        """Counts a tensor of any floating-point dtype; of a sparse one, the stored elements."""
        flat = dense(tensor.detach()).reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            self._add(flat[start : start + _CHUNK].float().abs())

    def row(self, kind: Kind, layer: str) -> RangeRow:
        """Returns the counts so far."""
        assert self._counts is not None, "`Probe` creates a tally together with its first tensor"
        smallest = self._smallest.item()
        return RangeRow(
            kind,
            layer,
            tuple(self._counts.tolist()),
            smallest=smallest if math.isfinite(smallest) else 0.0,
            largest=self._largest.item(),
        )

    def _add(self, magnitudes: Tensor) -> None:
        """Counts magnitudes, float32 of shape ``(n,)`` with n at least 1."""
        bins = torch.bucketize(magnitudes, _edges(magnitudes.device), out_int32=True)
        counts = torch.bincount(bins, minlength=N_BINS)
        finite = magnitudes.isfinite()
        largest = magnitudes.where(finite, 0.0).amax()
        smallest = magnitudes.where(finite & (magnitudes > 0), math.inf).amin()
        if self._counts is None:
            self._counts, self._smallest, self._largest = counts, smallest, largest
            return
        device = self._counts.device
        self._counts = self._counts + counts.to(device)
        self._smallest = torch.minimum(self._smallest, smallest.to(device))
        self._largest = torch.maximum(self._largest, largest.to(device))
