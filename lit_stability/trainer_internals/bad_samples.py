"""Names the samples of a batch that made a NaN or Inf. May import torch but not Lightning."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_stability.diagnosis.nonfinite import NonFiniteOrigin
from lit_stability.measurement.tensor_tree import tensors_in


def of_batch(origin: NonFiniteOrigin | None, batch: Any) -> NonFiniteOrigin | None:
    """Returns an origin with the samples of its batch; without any where they are not known.

    A result whose first dimension is as long as the batch has a row for each sample.

    Args:
        origin: as `locate_nonfinite` found it.
        batch: that the step was run with.
    """
    if origin is None:
        return None
    tensors = [each for each in tensors_in(batch) if each.ndim]
    size = len(tensors[0]) if tensors else 0
    if size != origin.batch_size or not origin.samples:
        return replace(origin, samples=(), batch_size=0)
    of_samples = [each for each in tensors if len(each) == size]
    return replace(origin, digests=tuple(_digest(of_samples, row) for row in origin.samples))


def _digest(tensors: Sequence[Tensor], row: int) -> int:
    """Returns a checksum of one row of each tensor."""
    checksum = 0
    for each in tensors:
        if each.layout == torch.strided:
            numbers = each[row : row + 1].detach().contiguous().view(torch.uint8).cpu().numpy()
            checksum = zlib.crc32(numbers.tobytes(), checksum)
    return checksum
