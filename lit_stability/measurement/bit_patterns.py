"""Compares tensors bit by bit: checksums, differing elements, and which of their bits differ.

May import torch; knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_stability.distributed.dtensor import local

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = 8
"""Elements up to which damage of a tensor looks like a write of the program."""


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
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        total = words(tensor).sum(dtype=torch.int64)
        by_device.setdefault(total.device, []).append((index, total))
    found = [0] * len(tensors)
    for sums in by_device.values():
        host = torch.stack([total for _, total in sums]).tolist()
        for (index, _), total in zip(sums, host, strict=True):
            found[index] = int(total)
    return found


def flipped_bit(before: int, now: int) -> int | None:
    """Returns which bit of one element has flipped between two checksums; None for other changes.

    >>> flipped_bit(1000, 1000 + 2**12), flipped_bit(1000, 1000 - 2**31), flipped_bit(1000, 1003)
    (12, 31, None)
    """
    change = abs(now - before)
    return change.bit_length() - 1 if change and change & (change - 1) == 0 else None


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

    A tensor whose version counter has risen was written by the program, and one whose checksum
    changed by other than a power of two is taken as written through ``tensor.data``: neither is
    judged. So a flip of several bits at once is not found here.

    >>> weight = torch.zeros(16)
    >>> guard = RestGuard(); guard.record({"w": weight})
    >>> weight.view(torch.int32).data[3] ^= 1 << 20
    >>> guard.check()
    [('w', 20)]
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, int, int]] = []

    def record(self, tensors: Mapping[str, Tensor]) -> None:
        """Computes the checksums of tensors; replaces what was recorded before."""
        large = {n: t for n, t in tensors.items() if t.is_floating_point() and t.numel() > SMALL}
        sums = checksums(list(large.values()))
        self._kept = [
            (name, t, t._version, total)
            for (name, t), total in zip(large.items(), sums, strict=True)
        ]

    def check(self) -> list[tuple[str, int]]:
        """Returns name and bit of each tensor in which a bit has flipped; forgets them all."""
        kept = [each for each in self._kept if each[1]._version == each[2]]
        self._kept = []
        now = checksums([tensor for _, tensor, _, _ in kept])
        pairs = zip(kept, now, strict=True)
        found = ((name, flipped_bit(before, total)) for (name, _, _, before), total in pairs)
        return [(name, bit) for name, bit in found if bit is not None]

    def forget(self) -> None:
        """Releases the tensors."""
        self._kept = []
