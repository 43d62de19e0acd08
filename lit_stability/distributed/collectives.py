"""Collectives by which all ranks reach the same decision, mostly without waiting.

Every decision follows from numbers that are the same on all ranks, and all ranks enter every
collective at the same place, whatever one of them has measured. One optimizer step under DDP:

``on_before_backward``, of the last micro-batch
    Starts the sum of one vector over the ranks, which runs during backward. It holds loss, update
    and scan of the weights. Each rank also has its own row in it, which the sum does not mix: the
    verdict on its moments, the checksum of its weights and its learning rate.
``on_before_optimizer_step``
    Waits for the vector and reads it together with the norms of the gradients, which DDP has
    averaged. An anomaly in the vector is found by all ranks: it is *shared*, and they may exchange
    data about it at once, in blocking collectives. An anomaly in the gradients may be local, if one
    rank's gradients were damaged after DDP averaged them. That rank skips its own step and does
    nothing else (``on_local_anomaly``). Each rank votes: whether it rejects the step, and its
    gradient norm. The votes are summed while the optimizer steps.
``on_train_batch_end``
    Counts the votes before any counter, snapshot or checkpoint includes the step. If all ranks
    reject the step, it is handled like a shared incident. If only some do, or if the gradient norms
    differ, the ranks disagree: all roll back to a snapshot from before the step, and continue with
    the consensus state of rank 0.

The vote must be counted in the same step, not in the next one: between two steps a rank that alone
had skipped the step would have a lower step count than the others, and would miss a checkpoint at
which they stop.

With sharded gradients (FSDP2) the norms are unknown until they are summed. Then everything goes
into one vector in ``on_before_optimizer_step``, all ranks have the same numbers, and no vote is
needed. Manual optimization and LBFGS under DDP work the same way, because ``on_before_backward``
does not tell which step it belongs to.

Replicas must agree to the last bit, because they apply the same gradients to the same weights. The
checksums are therefore compared exactly; a sum of whole numbers in fp64 is exact in any order.
Gradient norms are compared to a thousandth, because some devices add in no fixed order; smaller
differences show in the checksum.

Three collectives block a healthy step. On a step with probes, by default one in fifty, the readings
of all ranks are gathered after the measurement. Where a snapshot is taken, each rank reports
whether it had the memory for it, and until it is decided where snapshots are kept, how much it has.
Where a good checkpoint is due, by default once in 500 steps, the ranks agree on the copy.

Votes and the data of an incident are on the host and use a separate gloo group, so they copy
nothing from the device. May import torch but not Lightning.
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
    """Communicator of the ranks of a run; all ranks must create and close it together.

    Args:
        replicas: whether every rank holds all weights and averaged gradients, as under DDP.
        overlapped: whether the vector is summed while backward runs.
    """

    def __init__(self, *, replicas: bool, overlapped: bool) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.replicas, self.overlapped = replicas, overlapped
        self._host = dist.new_group(backend="gloo")

    def sum(self, shared: Tensor, row: Tensor) -> Summed:
        """Starts the sum of a vector and of each rank's row, where they are.

        Weights that are kept on the host have no NCCL.
        """
        on_host = shared.device.type == "cpu" and dist.get_backend() == "nccl"
        return _start_sum(shared, row, self, self._host if on_host else None)

    def vote(self, row: Sequence[float]) -> Summed:
        """Starts to collect each rank's row, on the host."""
        empty = torch.empty(0, dtype=torch.float64)
        return _start_sum(empty, torch.tensor(row, dtype=torch.float64), self, self._host)

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks in order; blocks, so only for incidents and probes."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._host)
        return values

    def from_first(self, value: T) -> T:
        """Returns the value of rank 0; blocks, so only for shared incidents."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._host)
        return values[0]

    @property
    def host_group(self) -> Any:
        """Returns the process group that exchanges data on the host."""
        return self._host

    def close(self) -> None:
        """Destroys the process group."""
        if dist.is_initialized():
            dist.destroy_process_group(self._host)


@dataclass
class Summed:
    """A sum over the ranks that is in progress."""

    vector: Tensor
    shared: int
    """Length of the shared part, which comes before the rows."""
    world: int
    _work: Any

    def wait(self) -> Tensor:
        """Waits until all ranks have contributed, and returns the vector."""
        self._work.wait()
        return self.vector

    def split(self, numbers: Sequence[float]) -> tuple[Sequence[float], list[Sequence[float]]]:
        """Splits the vector, copied to the host, into the shared part and the row of each rank."""
        length = (len(numbers) - self.shared) // self.world
        starts = range(self.shared, len(numbers), length)
        return numbers[: self.shared], [numbers[i : i + length] for i in starts]


def _start_sum(shared: Tensor, row: Tensor, ranks: Ranks, group: Any) -> Summed:
    length = len(row)
    vector = torch.zeros(
        len(shared) + ranks.world * length, dtype=torch.float64, device=shared.device
    )
    vector[: len(shared)] = shared
    start = len(shared) + ranks.rank * length
    vector[start : start + length] = row
    work = dist.all_reduce(vector, group=group, async_op=True)
    return Summed(vector, len(shared), ranks.world, work)
