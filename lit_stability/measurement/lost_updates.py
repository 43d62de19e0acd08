"""16-bit weights that stand still although their gradient pulls: updates that rounding swallows.

May import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.half_precision import HALF
from lit_stability.measurement.norms import dense
from lit_stability.measurement.weight_sampling import blocks_of

EVERY = 10
"""Steps between looks."""
_BLOCKS, _BLOCK = 4, 32
"""The sample of a parameter: 4 blocks of 32 neighbours; smaller ones are taken whole."""


class Rounding:
    """Looks at a sample of the 16-bit weights on one step in ten.

    A weight is stuck if it is bit for bit what it was ten updates ago and its gradient had one sign
    at both looks. One update alone says little: those of a weight that has arrived are small and
    may be lost without harm, and their signs change.

    Args:
        parameters: of an optimizer; those in other formats are left out.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.dtype in HALF]
        self._steps = 0
        self.forget()

    def forget(self) -> None:
        """Drop what was seen at the last look."""
        self._last: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def look(self) -> list[Tensor]:
        """Count the stuck weights among those whose gradient pulls, before an update.

        Returns:
            One tensor of shape ``(2,)``, both numbers; nothing where it is not the turn of this
            step, or where no weight was looked at before.
        """
        self._steps += 1
        if not self._parameters or self._steps % EVERY:
            return []
        now = {p: (_sample(p), _sample(dense(g)).sign()) for p, g in self._gradients()}
        pairs = [(self._last[p], now[p]) for p in now if p in self._last]
        self._last = {p: (weights.clone(), sign) for p, (weights, sign) in now.items()}
        if not pairs:
            return []
        pulled = torch.cat([(a * b) > 0 for (_, a), (_, b) in pairs])
        still = torch.cat([a == b for (a, _), (b, _) in pairs])
        return [torch.stack([(still & pulled).sum(), pulled.sum()]).float()]

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        pairs = [(p, p.grad) for p in self._parameters]
        return [(p, g) for p, g in pairs if g is not None and g.layout is torch.strided]


def lost_epsilon(optimizers: Iterable[Optimizer]) -> str | None:
    """What is wrong with an optimizer whose ``eps`` is 0 in the format of its weights, or None.

    Of ``torch.optim`` only, and not fused: those compute in float32.
    """
    for optimizer in optimizers:
        if not type(optimizer).__module__.startswith("torch.optim"):
            continue
        for group in optimizer.param_groups:
            eps = group.get("eps")
            if not isinstance(eps, float) or not eps or group.get("fused"):
                continue
            formats = {p.dtype for p in group["params"] if p.dtype in HALF}
            lost = [f for f in formats if not torch.tensor(eps, dtype=f)]
            if lost:
                name = str(lost[0]).removeprefix("torch.")
                return (
                    f"{type(optimizer).__name__}'s eps of {eps:g} is 0 in {name}, and its first "
                    "update 0 / 0"
                )
    return None


def _sample(tensor: Tensor) -> Tensor:
    flat = local(tensor.detach())
    if flat.numel() > _BLOCKS * _BLOCK:
        return blocks_of(flat, _BLOCKS, _BLOCK).reshape(-1)
    return flat.reshape(-1)
