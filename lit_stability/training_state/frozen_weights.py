"""One copy, for all snapshots, of weights that do not train.

A frozen backbone is most of the memory of a fine-tuning, and two snapshots would hold it twice.
May import torch; knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLES = 256
"""Elements of a parameter that are looked at. What moves a frozen network, as the teacher of a
self-distillation, moves nearly all of its elements."""


@dataclass(frozen=True)
class Kept:
    """A frozen parameter and its copy."""

    live: Tensor
    saved: Tensor
    version: int
    pointer: int

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back."""
        self.live.copy_(self.saved)


class FrozenWeights:
    """Tells the frozen parameters that stand still from those that move, and keeps the former.

    A parameter counts as still while it does not require a gradient, its version counter and its
    memory are those of its copy, and so are 256 of its elements: `p.data.mul_(...)` changes no
    version. One that has moved is never kept again. Its old copy lives as long as a snapshot
    refers to it.

    >>> weights, frozen = [torch.ones(3), torch.nn.Parameter(torch.ones(2))], FrozenWeights()
    >>> moving, kept = frozen.split(weights)
    >>> len(moving), [each.saved.tolist() for each in kept]
    (1, [[1.0, 1.0, 1.0]])
    """

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        """Those that stand still, by the identity of the parameter."""
        self._moved: set[int] = set()

    @torch.no_grad()
    def split(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Kept]]:
        """The parameters that a snapshot has to copy itself, and the copies of all others.

        Reads one number from the device where there is a copy to compare with.
        """
        moving, still = [], []
        for each in parameters:
            held = self._kept.get(id(each))
            if not _can_be_kept(each) or id(each) in self._moved:
                self._kept.pop(id(each), None)
                moving.append(each)
            elif held is None or held.live is not each:
                still.append(self._keep(each))
            elif held.version != each._version or held.pointer != each.data_ptr():
                moving.append(self._give_up(held))
            else:
                still.append(held)
        if not _equal(still):
            changed = [each for each in still if not _equal([each])]
            moving += [self._give_up(each) for each in changed]
            still = [each for each in still if id(each.live) in self._kept]
        return moving, still

    def _keep(self, parameter: Tensor) -> Kept:
        kept = Kept(parameter, parameter.detach().clone(), parameter._version, parameter.data_ptr())
        self._kept[id(parameter)] = kept
        return kept

    def _give_up(self, kept: Kept) -> Tensor:
        """Keep the parameter no more; the snapshots that refer to its copy still have it."""
        del self._kept[id(kept.live)]
        self._moved.add(id(kept.live))
        return kept.live

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that are still in use."""
        return sum(each.saved.numel() * each.saved.element_size() for each in self._kept.values())


def _can_be_kept(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, torch.nn.Parameter)
    still = plain and not parameter.requires_grad and not parameter.is_inference()
    return still and parameter.is_contiguous()


def _equal(kept: Sequence[Kept]) -> bool:
    """Whether some elements of each are as they were, to the bit."""
    groups: dict[tuple[torch.dtype, torch.device], list[Kept]] = {}
    for each in kept:
        groups.setdefault((each.live.dtype, each.live.device), []).append(each)
    for group in groups.values():
        now = torch.cat([_sampled(each.live) for each in group])
        then = torch.cat([_sampled(each.saved) for each in group])
        if not torch.equal(now.view(torch.uint8), then.view(torch.uint8)):  # a NaN is itself there
            return False
    return True


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]
