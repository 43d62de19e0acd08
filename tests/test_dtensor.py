"""What a rank contributes of a sharded tensor."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lit_stability.distributed.dtensor import share


class Mesh:
    """Two by two ranks."""

    def size(self, dimension):
        return 2


@pytest.mark.parametrize(
    ("placements", "expected"),
    [
        ((Replicate(), Replicate()), 0.25),
        ((Shard(0), Replicate()), 0.5),
        ((Shard(0), Shard(1)), 1.0),
        # As FSDP2 makes it of weights that tensor parallelism has sharded.
        ((_StridedShard(0, split_factor=2), Shard(0)), 1.0),
    ],
    ids=str,
)
def test_weights_of_all_copies_of_an_element_add_up_to_one(placements, expected):
    tensor = SimpleNamespace(placements=placements, device_mesh=Mesh())
    assert share(tensor, 4) == expected


def test_plain_tensor_is_the_same_on_all_ranks():
    assert share(torch.ones(2), 4) == 0.25
