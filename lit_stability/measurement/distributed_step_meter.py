"""The meter of one rank among several: the same numbers on all of them, from one sum.

The protocol is told in `lit_stability.distributed.collectives`. May import torch; knows no
Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.distributed.collectives import Ranks, Summed
from lit_stability.distributed.dtensor import share
from lit_stability.measurement.norms import Gradients, to_host
from lit_stability.measurement.step_meter import Reading, StepMeter


@dataclass
class _Vector:
    """What is added up, by name."""

    sum: Summed
    lengths: dict[str, int] = field(default_factory=dict)

    def split(
        self, numbers: Sequence[float]
    ) -> tuple[dict[str, Sequence[float]], list[Sequence[float]]]:
        shared, rows = self.sum.split(numbers)
        parts, start = {}, 0
        for name, length in self.lengths.items():
            parts[name] = shared[start : start + length]
            start += length
        return parts, rows


class DistributedStepMeter(StepMeter):
    """Measures like `StepMeter`, for all ranks together.

    Under DDP `begin` starts the sum of all that does not depend on the step's gradients; without
    it, and where gradients are sharded, `measure` adds everything up and waits.

    Args:
        named_parameters: ``(name, parameter)`` pairs; those the optimizer lacks are left out.
        optimizer: the optimizer whose updates are measured.
        index: position of the optimizer in ``trainer.optimizers``.
        ranks: those who measure together.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        index: int,
        ranks: Ranks,
    ) -> None:
        super().__init__(named_parameters, optimizer, index)
        self._ranks = ranks
        self._begun: _Vector | None = None
        shares = [share(p, ranks.world) for p in self.parameters]
        self._shares = torch.tensor(shares, dtype=torch.float64, device=self._samples.device)

    def forget(self) -> None:
        """See `StepMeter`; a sum that was begun is waited for, as the other ranks do."""
        if getattr(self, "_begun", None) is not None:
            self._drop()
        super().forget()

    @torch.no_grad()
    def begin(
        self,
        loss: Tensor | None,
        *,
        loss_scale: Tensor | None = None,
        learning_rates: Sequence[float] = (),
        scan_weights: bool = False,
    ) -> None:
        """Start adding up what does not depend on the gradients; arguments as in `measure`."""
        if self._begun is not None:
            self._drop()
        self._begun = self._start(loss, loss_scale, scan_weights, sum(learning_rates))

    def _drop(self) -> None:
        assert self._begun is not None
        self._begun.sum.wait()
        self._begun = None
        self._scanned = self._scanned_weights = None

    def _start(
        self,
        loss: Tensor | None,
        loss_scale: Tensor | None,
        scan_weights: bool,
        rate: float,
        grads: Gradients | None = None,
    ) -> _Vector:
        device = self._samples.device
        updates = self._update_sums()
        assert self._last_weights is not None
        parts = {"loss": _present(loss, device), "scale": _present(loss_scale, device)}
        parts["updates"] = torch.cat(updates) if updates else torch.zeros(2, device=device)
        if scan_weights:
            (norms,), (peaks,) = self._scan()
            parts["weights"] = self._squares(norms)
            # Of shards the sums of norms are norms as well, if others than that of the whole.
            parts["peaks"] = peaks.to(device).double() * self._shares
            for extents in self._extents():
                parts["extents"] = extents.double() * self._shares.repeat(3)
        if grads is not None:
            parts["grads"] = self._squares(self._norms_by_parameter(grads))
        row = torch.empty(5, dtype=torch.float64, device=device)
        row[:3] = self._moments.row(device)
        row[3] = checksum(self._last_weights) if self._ranks.replicas else 0.0
        row[4] = rate
        shared = torch.cat([part.double() for part in parts.values()])
        lengths = {name: len(part) for name, part in parts.items()}
        return _Vector(self._ranks.sum(shared, row), lengths)

    def _norms_by_parameter(self, grads: Gradients) -> Tensor:
        """Norms of the gradients, 0 where a parameter has none."""
        if not grads.complete:
            there = dict(zip(grads.names, grads.tensors, strict=True))
            nothing = torch.empty(0, device=self._samples.device)
            grads = Gradients(self.names, [there.get(n, nothing) for n in self.names], False)
        (norms,) = self._gradient_norms(grads)
        return norms

    def _squares(self, norms: Tensor) -> Tensor:
        """This rank's contribution to the squared norm of each parameter."""
        return norms.to(self._shares.device).double().square() * self._shares

    def _read(
        self,
        loss: Tensor | None,
        loss_scale: Tensor | None,
        scan_weights: bool,
        rate: float,
        grads: Gradients,
        rows: Sequence[Tensor],
        also: Sequence[Tensor],
    ) -> Reading:
        begun, self._begun = self._begun, None
        vector = begun or self._start(loss, loss_scale, scan_weights, rate, grads)
        own = self._gradient_norms(grads) if begun else []
        # Replicas are stuck alike; of shards it is not asked.
        stuck = self._rounding.look() if self._ranks.replicas else []
        groups = {"grads": own, "rows": rows, "also": also, "stuck": stuck}
        host = to_host({"vector": [vector.sum.wait()], **groups})
        parts, ranks = vector.split(host["vector"])
        if not begun:
            norms = dict(zip(self.names, _roots(parts["grads"]), strict=True))
            host["grads"] = [norms[n] for n in grads.names]
        return Reading(
            loss=_mean(parts["loss"]),
            scale=_mean(parts["scale"]),
            grad_norms=host["grads"],
            weight_norms=_roots(parts.get("weights", ())),
            updates=parts["updates"],
            peaks=parts.get("peaks", ()),
            extents=parts.get("extents", ()),
            moments=self._moments.judge_rows([row[:3] for row in ranks]),
            distributions=host["rows"],
            also=host["also"],
            stuck=host["stuck"],
            rank_weights=tuple(row[3] for row in ranks) if self._ranks.replicas else (),
            rank_rates=tuple(row[4] for row in ranks),
        )


def checksum(sample: Tensor) -> Tensor:
    """Sum of the bit patterns of fp32 numbers, as whole numbers: exact in whatever order."""
    return sample.view(torch.int32).sum(dtype=torch.float64)


def _present(value: Tensor | None, device: torch.device) -> Tensor:
    """A number and whether there is one, so that all ranks add as many."""
    if value is None:
        return torch.zeros(2, device=device)
    value = value.detach().to(device).double().reshape(1)
    return torch.cat([value, torch.ones_like(value)])


def _mean(pair: Sequence[float]) -> float | None:
    return pair[0] / pair[1] if pair[1] else None


def _roots(squares: Sequence[float]) -> list[float]:
    return [math.sqrt(x) if x >= 0 else math.nan for x in squares]
