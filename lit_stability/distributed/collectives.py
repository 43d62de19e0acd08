"""How several ranks come to the same decision without waiting for each other.

Every decision follows from numbers that all ranks have alike, and every collective is entered by
all ranks at the same place whatever one of them has seen. One optimizer step under DDP:

``on_before_backward``, of the last micro-batch
    One vector is summed over the ranks while backward runs: loss, update, scan of the weights; and,
    in a row of its own which the sum leaves as it is, each rank's judgement of its moments, the
    checksum of its weights and its learning rate.
``on_before_optimizer_step``
    The vector is waited for and read together with the norms of the gradients, which DDP has
    averaged. What detectors find in the vector all ranks find: it is *shared*, and they may talk
    about it at once, in collectives that wait. What they find in the gradients need not be: one
    rank's may have been damaged after DDP averaged them. That rank vetoes its own step, and does
    nothing more (``on_local_anomaly``). Each rank votes: whether it objects, and its gradient norm.
    The votes are summed while the optimizer steps.
``on_train_batch_end``
    The votes are counted before a counter, a snapshot or a checkpoint has seen the step. If all
    object, it is an incident like one that is shared. If some do, or if the gradient norms differ,
    the ranks disagree: all go back to a snapshot from before the step, and on from rank 0's books.

The vote belongs to the same step, not to the next: between two steps a rank that had vetoed alone
would count fewer steps than the others, and would miss the checkpoint that they stop for.

Where the gradients themselves are sharded (FSDP2), their norms are unknown until they are summed:
there everything goes into one vector in ``on_before_optimizer_step``, all ranks know the same, and
no vote is needed. So do manual optimization and LBFGS under DDP, where ``on_before_backward`` does
not say which step it belongs to.

Replicas must agree to the last bit, as they apply the same gradients to the same weights: the
checksums are compared exactly, and a sum of whole numbers in fp64 is exact in any order. Gradient
norms are compared to a thousandth, as some devices add in no fixed order; what is smaller than that
shows in the checksum.

Where it is a probe's turn, by default on one step in fifty, what each rank has read is gathered
after the measurement: the only collective that a healthy step waits for by itself.

Votes, and all that is said at an incident, are numbers of the host and go through a group of their
own over gloo: they copy nothing from the device. May import torch; knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """What the ranks of a run say to each other. To be made, and closed, by all ranks together.

    Args:
        replicas: whether every rank holds all weights and averaged gradients, as under DDP.
        overlapped: whether the vector is summed while backward runs.
    """

    def __init__(self, *, replicas: bool, overlapped: bool) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.replicas, self.overlapped = replicas, overlapped
        self._host = dist.new_group(backend="gloo")

    def sum(self, shared: Tensor, row: Tensor) -> Summed:
        """Begin to add up a vector and each rank's row, on the device."""
        return _begin(shared, row, self, None)

    def vote(self, row: Sequence[float]) -> Summed:
        """Begin to collect each rank's row, on the host."""
        nothing = torch.empty(0, dtype=torch.float64)
        return _begin(nothing, torch.tensor(row, dtype=torch.float64), self, self._host)

    def gather(self, value: T) -> list[T]:
        """What each rank says, in their order; waits for all: for shared incidents, and probes."""
        said: list[Any] = [None] * self.world
        dist.all_gather_object(said, value, group=self._host)
        return said

    def from_first(self, value: T) -> T:
        """What rank 0 says; waits for it: for shared incidents only."""
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self._host)
        return said[0]

    def close(self) -> None:
        """Give the group back."""
        if dist.is_initialized():
            dist.destroy_process_group(self._host)


@dataclass
class Summed:
    """A sum that is under way."""

    vector: Tensor
    shared: int
    """Numbers before the rows."""
    world: int
    _work: Any

    def wait(self) -> Tensor:
        """The vector, once all ranks have added to it."""
        self._work.wait()
        return self.vector

    def split(self, numbers: Sequence[float]) -> tuple[Sequence[float], list[Sequence[float]]]:
        """The vector, on the host, as what is shared and the row of each rank."""
        length = (len(numbers) - self.shared) // self.world
        starts = range(self.shared, len(numbers), length)
        return numbers[: self.shared], [numbers[i : i + length] for i in starts]


def _begin(shared: Tensor, row: Tensor, ranks: Ranks, group: Any) -> Summed:
    length = len(row)
    vector = torch.zeros(
        len(shared) + ranks.world * length, dtype=torch.float64, device=shared.device
    )
    vector[: len(shared)] = shared
    start = len(shared) + ranks.rank * length
    vector[start : start + length] = row
    work = dist.all_reduce(vector, group=group, async_op=True)
    return Summed(vector, len(shared), ranks.world, work)
