"""Scans a module's buffers, and weights in use, for NaN. May import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.norms import norms_of
from lit_stability.measurement.number_formats import is_measurable

RUNNING = ("running_mean", "running_var")
"""Names of the statistics in normalization layers."""


class WatchedBuffers:
    """The floating-point buffers of a module that are finite when the watch begins.

    A NaN is damage, and so is an Inf in a running mean or variance. Any other Inf may be there on
    purpose: a mask that is filled with -inf, a limit.

    Args:
        module: with its buffers; one that is replaced by another tensor is found by its name.
        weights: returns weights to watch too, by name: those that the module computes with, where
            an optimizer has others.
    """

    def __init__(
        self, module: nn.Module, weights: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> None:
        self._module, self._weights = module, weights or dict
        measurable = {n: b for n, b in self._present().items() if is_measurable(b)}
        found = {n: b for n, b in measurable.items() if b.is_floating_point()}
        finite = _are_finite([*found.values()])
        watched = self._weights()
        pairs = zip(found, finite, strict=True)
        self.names = tuple(n for n, good in pairs if good or n in watched)
        running = torch.tensor([n.rpartition(".")[2] in RUNNING for n in self.names])
        self._running = running.to(found[self.names[0]].device) if self.names else running

    @torch.no_grad()
    def flags(self) -> list[Tensor]:
        """Returns one tensor with 1 for each watched buffer that is damaged; [] without any."""
        if not self.names:
            return []
        present = self._present()
        buffers = [present.get(name) for name in self.names]
        empty = torch.zeros(())
        (norms,) = norms_of([empty if b is None else local(b) for b in buffers])
        self._running = self._running.to(norms.device)
        return [torch.where(self._running, ~norms.isfinite(), norms.isnan()).float()]

    def _present(self) -> dict[str, Tensor]:
        return {**self._weights(), **dict(self._module.named_buffers())}

    def names_of(self, flags: Sequence[float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the names whose flag is set, of the weights and of the buffers."""
        bad = [n for n, flag in zip(self.names, flags, strict=False) if flag]
        weights = self._weights() if bad else {}
        return tuple(n for n in bad if n in weights), tuple(n for n in bad if n not in weights)


@torch.no_grad()
def _are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    norms = [n.tolist() for n in norms_of([local(t) for t in tensors])]
    return [n - n == 0 for group in norms for n in group]
