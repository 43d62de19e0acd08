"""Compares tensors bit by bit: checksums, differing elements, and which of their bits differ.

May import torch; knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import local

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = 8
"""Elements up to which damage of a tensor looks like a write of the program."""
_BLOCKS = 1024
"""Most parts of a tensor whose checksums `RestGuard` keeps apart."""


def words(tensor: Tensor) -> Tensor:
    """Returns the elements of a tensor as integers with the same bits; of a DTensor, its shard.

    >>> words(torch.tensor([1.0, -0.0])).tolist()
    [1065353216, -2147483648]
    """
    own = local(tensor.detach())
    if own.is_sparse:
        own = own.coalesce().values()
    own = torch.view_as_real(own) if own.is_complex() else own
    return own.view(_WORDS[own.element_size()])


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Returns for each tensor the sum of its `words`, modulo 2**64; one copy to the host in all.

    The flip of bit k of one element changes it by ``2**k``, so that no single flip is missed. The
    order of the additions does not matter.

    >>> checksums([torch.tensor([1.0, 2.0])]) == checksums([torch.tensor([2.0, 1.0])])
    True
    """
    return _to_host([words(tensor).sum(dtype=torch.int64) for tensor in tensors])


def _to_host(numbers: Sequence[Tensor]) -> list[Any]:
    """Returns the content of integer tensors of one shape; one copy from each device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, each in enumerate(numbers):
        by_device.setdefault(each.device, []).append(index)
    found: list[Any] = [None] * len(numbers)
    for indices in by_device.values():
        host = torch.stack([numbers[i] for i in indices]).tolist()
        for index, content in zip(indices, host, strict=True):
            found[index] = content
    return found


def _of_blocks(tensor: Tensor) -> Tensor:
    """Returns the sums of `words` of equal parts of a tensor, and of the rest, modulo 2**64."""
    flat = words(tensor).reshape(-1)
    size = max(1, -(-flat.numel() // _BLOCKS))
    whole = flat.numel() // size * size
    blocks = flat[:whole].view(-1, size).sum(1, dtype=torch.int64)
    return torch.cat([blocks, flat[whole:].sum(dtype=torch.int64).reshape(1)])


def flipped_bit(change: int) -> int | None:
    """Returns which bit of one element has flipped, by the change of a checksum; None for others.

    >>> flipped_bit(2**12), flipped_bit(-(2**31)), flipped_bit(3), flipped_bit(0)
    (12, 31, None, None)
    """
    size = abs(change)
    return size.bit_length() - 1 if size and size & (size - 1) == 0 else None


@dataclass(frozen=True)
class Difference:
    """How two tensors with the same name differ."""

    name: str
    elements: int
    """How many elements differ."""
    bits: tuple[int, ...]
    """Bits that differ, of the first element that does; 0 is the lowest."""
    relative: float
    """Norm of the difference over the larger norm; Inf if either is not finite."""
    size: int
    """Elements of the tensor."""

    def text(self) -> str:
        """Returns the name, and how many elements and which bits differ."""
        if self.elements > 1:
            return f"{self.name} ({self.elements} of {self.size} elements)"
        bits = ", ".join(map(str, self.bits))
        return f"{self.name} ({f'bit {bits}' if len(self.bits) < 4 else f'{len(self.bits)} bits'})"


def difference(name: str, a: Tensor, b: Tensor) -> Difference | None:
    """Returns how two tensors differ, or None if they have the same bits.

    >>> difference("w", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])).text()
    'w (bit 21)'
    """
    left, right = words(a), words(b)
    if left.shape != right.shape or left.dtype != right.dtype:
        return Difference(name, max(left.numel(), right.numel()), (), float("inf"), left.numel())
    if torch.equal(left, right):
        return None
    unequal = left != right
    first = (left ^ right)[unequal][0].item()
    width = 8 * left.element_size()
    bits = tuple(bit for bit in range(width) if int(first) >> bit & 1)
    return Difference(name, int(unequal.sum()), bits, _relative(a, b), left.numel())


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Difference]:
    """Returns how the tensors of two mappings differ; one that only one of them has is skipped."""
    pairs = ((name, a[name], b[name]) for name in a if name in b)
    return [found for pair in pairs if (found := difference(*pair)) is not None]


def _relative(a: Tensor, b: Tensor) -> float:
    x, y = (_wide(each) for each in (a, b))
    largest = max(float(x.norm()), float(y.norm()))
    ratio = float((x - y).norm()) / largest if largest else 0.0
    return ratio if ratio == ratio else float("inf")


def _wide(tensor: Tensor) -> Tensor:
    own = local(tensor.detach())
    own = own.coalesce().values() if own.is_sparse else own
    own = torch.view_as_real(own) if own.is_complex() else own
    # MPS has no float64.
    return own.float() if own.device.type == "mps" else own.double()


class RestGuard:
    """Finds a bit that flipped in tensors that nothing should write in the meantime.

    A tensor whose version counter has risen was written by the program. One in which more than one
    of up to 1024 blocks has changed, or one by other than a power of two, is taken as written
    through ``tensor.data``: halving or negating a tensor changes its checksum by a power of two, if
    that many elements are in it. Neither is judged, so a flip of several bits is not found here.

    >>> weight = torch.ones(16)
    >>> guard = RestGuard(); guard.record({"w": weight})
    >>> weight.view(torch.int32).data[3] ^= 1 << 20
    >>> guard.check()
    [('w', 20)]
    >>> guard.record({"w": weight}); weight.data.mul_(0.5).numel(); guard.check()
    16
    []
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, int, Tensor]] = []

    def record(self, tensors: Mapping[str, Tensor]) -> None:
        """Computes the checksums of tensors; replaces what was recorded before."""
        large = {n: t for n, t in tensors.items() if t.is_floating_point() and t.numel() > SMALL}
        self._kept = [(name, t, t._version, _of_blocks(t)) for name, t in large.items()]

    def check(self) -> list[tuple[str, int]]:
        """Returns name and bit of each tensor in which a bit has flipped; forgets them all."""
        kept = [each for each in self._kept if each[1]._version == each[2]]
        self._kept = []
        changes = [_of_blocks(tensor) - before for _, tensor, _, before in kept]
        # Number of blocks that changed, and by how much in all.
        counts = _to_host([torch.stack([c.count_nonzero(), c.sum()]) for c in changes])
        pairs = zip(kept, counts, strict=True)
        found = ((name, flipped_bit(s)) for (name, *_), (n, s) in pairs if n == 1)
        return [(name, bit) for name, bit in found if bit is not None]

    def forget(self) -> None:
        """Releases the tensors."""
        self._kept = []
