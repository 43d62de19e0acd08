"""What one rank holds of a tensor that several ranks share.

A sharded tensor (a ``DTensor``) is looked at through its local shard: measuring, copying or
spoiling it through its own operators would communicate, and a rank must never do that alone.
May import torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset({Tensor, nn.Parameter})
"""Types of tensors that a rank holds whole, with nothing behind them."""


def local(tensor: Tensor) -> Tensor:
    """The rank's own shard, in place and without gradient; any other tensor itself."""
    if type(tensor) in PLAIN:
        return tensor
    # Asked by name: importing DTensor costs a second, and a single device has none.
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        shard: Tensor = to_local()
    return shard


def share(tensor: Any, ranks: int) -> float:
    """The share of a tensor's elements that is this rank's to count, over all ranks exactly 1.

    A tensor that every rank holds whole is everybody's: ``1 / ranks``. Of a shard, all; less where
    groups of ranks hold the same shards.

    Args:
        tensor: plain or sharded.
        ranks: number of ranks.
    """
    placements = getattr(tensor, "placements", ())
    shards = 1
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            shards *= tensor.device_mesh.size(dimension)
    return shards / ranks
