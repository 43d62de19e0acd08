"""Access to the shard of a ``DTensor`` that this rank holds.

Operators on a ``DTensor`` communicate, which a rank must never do alone. Code that measures, copies
or modifies a tensor on one rank therefore uses the local shard. May import torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset({Tensor, nn.Parameter})
"""Tensor types that are never sharded."""


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, a view without gradient; other tensors unchanged."""
    if type(tensor) in PLAIN:
        return tensor
    # Checked by name: importing DTensor takes a second, and a single device needs none.
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        shard: Tensor = to_local()
    return shard


def shard_on_host(shard: Tensor, whole: Any) -> Any:
    """Returns a DTensor on the host that has this memory as its shard; for others the shard itself.

    No rank communicates.

    Args:
        shard: a copy of this rank's shard, in host memory.
        whole: the tensor that was copied.
    """
    if type(whole) in PLAIN or not hasattr(whole, "to_local"):
        return shard
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    mesh = whole.device_mesh
    if mesh.device_type != "cpu":
        # The copy is only written to disk: its mesh needs no connections.
        names = mesh.mesh_dim_names
        mesh = DeviceMesh("cpu", mesh.mesh.cpu(), mesh_dim_names=names, _init_backend=False)
    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(
        shard, mesh, whole.placements, run_check=False, shape=shape, stride=stride
    )


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether a tensor, or this rank's shard of it, decides what operations on it do.

    A quantised weight may be such a tensor, and may know only the operations of its layer.

    >>> is_wrapper(torch.zeros(2)), is_wrapper(nn.Parameter(torch.zeros(2)))
    (False, False)
    """
    if type(tensor) in PLAIN:
        return False
    kind = type(local(tensor))
    return kind not in PLAIN and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def share(tensor: Any, ranks: int) -> float:
    """Returns the weight of this rank's elements of a tensor in a sum over all ranks.

    The weights of all copies of an element add up to exactly 1: ``1 / ranks`` for a replicated
    tensor, 1 for a shard that only this rank holds, less if groups of ranks hold the same shards.

    Args:
        tensor: plain or sharded.
        ranks: number of ranks.
    """
    placements = getattr(tensor, "placements", ())
    shards = 1
    for dimension, placement in enumerate(placements):
        # A shard of a shard, as FSDP2 makes it of tensor parallel weights, is of another class.
        if not (placement.is_replicate() or placement.is_partial()):
            shards *= tensor.device_mesh.size(dimension)
    return shards / ranks


def shard_place(tensor: Any) -> tuple[int, ...]:
    """Returns which shard of a tensor this rank holds; empty for a plain or replicated tensor.

    Ranks with the same place hold the same elements.

    Args:
        tensor: plain or sharded.
    """
    placements = getattr(tensor, "placements", ())
    coordinate = tensor.device_mesh.get_coordinate() if placements else ()
    return tuple(
        place
        for place, placement in zip(coordinate or (), placements, strict=False)
        if not placement.is_replicate()
    )
