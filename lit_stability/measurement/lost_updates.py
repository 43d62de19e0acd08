"""Counts 16-bit weights that do not move despite their gradient: updates lost to rounding.

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
"""Steps between measurements."""
_BLOCKS, _BLOCK = 4, 32
"""Sample of a parameter: 4 blocks of 32 neighbours; a smaller parameter is used whole."""


class Rounding:
    """Measures a sample of the 16-bit weights on one step in ten.

    A weight is stuck if it has not changed a bit in ten updates although its gradient had the same
    sign at both ends. A single update means little: updates of a converged weight are small and may
    be lost without harm, but their signs change.

    Args:
        parameters: of an optimizer; those with other dtypes are skipped.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.dtype in HALF]
        self._steps = 0
        self.forget()

    def forget(self) -> None:
        """Clears the last measurement."""
        self._last: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def count_stuck(self) -> list[Tensor]:
        """Counts, before an update, the stuck weights among those whose gradient kept its sign.

        Returns:
            One tensor of shape ``(2,)`` with both counts; an empty list if this step is not
            measured, or if there is no earlier measurement to compare with.
        """
        self._steps += 1
        if not self._parameters or self._steps % EVERY:
            return []
        now = {p: (_sample(p), _sample(dense(g)).sign()) for p, g in self._gradients()}
        pairs = [(self._last[p], now[p]) for p in now if p in self._last]
        self._last = {p: (weights.clone(), sign) for p, (weights, sign) in now.items()}
        if not pairs:
            return []
        same_sign = torch.cat([(a * b) > 0 for (_, a), (_, b) in pairs])
        unchanged = torch.cat([a == b for (a, _), (b, _) in pairs])
        return [torch.stack([(unchanged & same_sign).sum(), same_sign.sum()]).float()]

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        pairs = [(p, p.grad) for p in self._parameters]
        return [(p, g) for p, g in pairs if g is not None and g.layout is torch.strided]


def lost_epsilon(optimizers: Iterable[Optimizer]) -> str | None:
    """Returns a description of the first optimizer whose ``eps`` is 0 in the dtype of its weights.

    Checks only optimizers of ``torch.optim``, except fused ones, which compute in float32. Returns
    None if all are fine.
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
                    f"{type(optimizer).__name__}'s eps of {eps:g} is 0 in {name}, so its first "
                    "update is 0 / 0"
                )
    return None


def _sample(tensor: Tensor) -> Tensor:
    flat = local(tensor.detach())
    if flat.numel() > _BLOCKS * _BLOCK:
        return blocks_of(flat, _BLOCKS, _BLOCK).reshape(-1)
    return flat.reshape(-1)
