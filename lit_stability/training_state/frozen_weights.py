"""One copy of the frozen weights, shared by all snapshots.

In fine-tuning, a frozen backbone takes most of the memory, and two snapshots would hold it twice.
May import torch, but not Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import PLAIN, is_wrapper, local
from lit_stability.training_state.tensor_parts import has_usual_memory

_SAMPLES = 256
"""Elements of a parameter that are compared. An update of a frozen network, such as the teacher
in self-distillation, changes nearly all of its elements."""


@dataclass(frozen=True)
class Kept:
    """A frozen parameter and its saved copy; of a sharded one, of this rank's shard."""

    parameter: Tensor
    live: Tensor
    saved: Tensor
    version: int
    pointer: int

    @torch.no_grad()
    def restore(self) -> None:
        """Copies the saved values into the parameter."""
        self.live.copy_(self.saved)


class FrozenWeights:
    """Finds the frozen parameters whose values do not change, and keeps one copy of each.

    A parameter counts as unchanged while it requires no gradient and its version counter, its
    memory address and 256 of its elements equal those of its copy. The elements are compared
    because `p.data.mul_(...)` does not raise the version counter. A parameter that has changed is
    never kept again; its old copy lives as long as a snapshot refers to it.

    >>> weights, frozen = [torch.ones(3), torch.nn.Parameter(torch.ones(2))], FrozenWeights()
    >>> changing, kept = frozen.split(weights)
    >>> len(changing), [copy.saved.tolist() for copy in kept]
    (1, [[1.0, 1.0, 1.0]])
    """

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        """Unchanged parameters, by ``id`` of the parameter."""
        self._changed: set[int] = set()

    @torch.no_grad()
    def split(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Kept]]:
        """Returns the parameters that a snapshot must copy itself, and the copies of all others.

        A frozen parameter in another format than torch's usual ones, such as a wrapper around
        quantised data, is in neither: it is not trained, and nothing is known about its memory.
        Synchronizes with the device once if there is a copy to compare with.
        """
        changing, unchanged = [], []
        for parameter in parameters:
            if not parameter.requires_grad and not has_usual_memory(local(parameter)):
                continue
            copy, live = self._kept.get(id(parameter)), _plain(local(parameter))
            if not _can_be_kept(parameter, live) or id(parameter) in self._changed:
                self._kept.pop(id(parameter), None)
                changing.append(parameter)
            elif copy is None or copy.parameter is not parameter:
                unchanged.append(self._keep(parameter, live))
            elif copy.version != live._version or copy.pointer != live.data_ptr():
                changing.append(self._release(copy))
            else:
                unchanged.append(copy)
        if not _equal(unchanged):
            changed = [copy for copy in unchanged if not _equal([copy])]
            changing += [self._release(copy) for copy in changed]
            unchanged = [copy for copy in unchanged if id(copy.parameter) in self._kept]
        return changing, unchanged

    def _keep(self, parameter: Tensor, live: Tensor) -> Kept:
        saved = live.detach().clone()
        kept = Kept(parameter, live, saved, live._version, live.data_ptr())
        self._kept[id(parameter)] = kept
        return kept

    def _release(self, kept: Kept) -> Tensor:
        """Stops keeping the parameter; snapshots that refer to its copy still hold it."""
        del self._kept[id(kept.parameter)]
        self._changed.add(id(kept.parameter))
        return kept.parameter

    @property
    def nbytes(self) -> int:
        """Returns the size in bytes of the copies of parameters that are still unchanged."""
        return sum(copy.saved.numel() * copy.saved.element_size() for copy in self._kept.values())


def _plain(live: Tensor) -> Tensor:
    """Returns a tensor of a subclass without operations of its own as a plain view."""
    return live if is_wrapper(live) or type(live) in PLAIN else live.as_subclass(Tensor)


def _can_be_kept(parameter: Tensor, live: Tensor) -> bool:
    plain = type(live) in PLAIN and has_usual_memory(live)
    frozen = plain and not parameter.requires_grad and not live.is_inference()
    return frozen and live.is_contiguous()


def _equal(kept: Sequence[Kept]) -> bool:
    """Returns whether the sampled elements of each parameter equal its copy, bit for bit."""
    groups: dict[tuple[torch.dtype, torch.device], list[Kept]] = {}
    for copy in kept:
        groups.setdefault((copy.live.dtype, copy.live.device), []).append(copy)
    for group in groups.values():
        now = torch.cat([sampled(copy.live) for copy in group])
        then = torch.cat([sampled(copy.saved) for copy in group])
        if not torch.equal(now.view(torch.uint8), then.view(torch.uint8)):  # as bytes, NaN == NaN
            return False
    return True


def sampled(tensor: Tensor) -> Tensor:
    """Returns about 256 elements of a tensor, evenly spread, in one dimension.

    >>> sampled(torch.arange(1024.0)).tolist()[:3]
    [0.0, 4.0, 8.0]
    """
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else _in_memory_order(tensor)
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Returns the elements in the order in which they lie in memory: a view, if without gaps."""
    found = tensor.detach()
    order = sorted(range(found.dim()), key=found.stride, reverse=True)
    return found.permute(order).reshape(-1)
