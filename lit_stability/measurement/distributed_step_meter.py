"""The step meter for several ranks: one sum gives all of them the same numbers.

`lit_stability.distributed.collectives` describes the protocol. May import torch but not Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.distributed.collectives import Ranks, Summed
from lit_stability.distributed.dtensor import share
from lit_stability.measurement.norms import Gradients, to_host
from lit_stability.measurement.step_meter import Reading, StepMeter
from lit_stability.measurement.watched_buffers import WatchedBuffers


@dataclass
class _Vector:
    """The parts of the vector that is summed over the ranks, by name."""

    sum: Summed
    lengths: dict[str, int] = field(default_factory=dict)

    def split(
        self, numbers: Sequence[float]
    ) -> tuple[dict[str, Sequence[float]], list[Sequence[float]]]:
        """Returns the parts that are shared, by name, and the row of each rank."""
        shared, rows = self.sum.split(numbers)
        parts, start = {}, 0
        for name, length in self.lengths.items():
            parts[name] = shared[start : start + length]
            start += length
        return parts, rows


class DistributedStepMeter(StepMeter):
    """Measures like `StepMeter`, for all ranks together.

    Under DDP, `begin` starts the sum of everything that does not depend on the step's gradients.
    Without `begin`, and with sharded gradients, `measure` sums everything and waits.

    Args:
        named_parameters: ``(name, parameter)`` pairs; those that the optimizer lacks are skipped.
        optimizer: the optimizer whose updates are measured.
        index: position of the optimizer in ``trainer.optimizers``.
        ranks: the communicator of the ranks that measure together.
        buffers: the buffers to scan together with the weights, or None.
        shares: where the parameters are parts of those of all ranks, the weight of this rank's
            elements in a sum over the ranks, by id; None for whole tensors and ``DTensor``.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        index: int,
        ranks: Ranks,
        buffers: WatchedBuffers | None = None,
        shares: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(named_parameters, optimizer, index, buffers, parts=shares is not None)
        self._ranks = ranks
        self._started: _Vector | None = None
        self._parts = shares is not None
        weights = [shares[id(p)] if shares else share(p, ranks.world) for p in self.parameters]
        self._shares = torch.tensor(weights, dtype=torch.float64, device=self._samples.device)

    def forget(self) -> None:
        """Clears the state of the last step; first waits for a started sum, as all ranks must."""
        if getattr(self, "_started", None) is not None:
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
        """Starts the sum of what does not depend on the gradients; arguments as in `measure`."""
        if self._started is not None:
            self._drop()
        self._started = self._start(loss, loss_scale, scan_weights, sum(learning_rates))

    def _drop(self) -> None:
        assert self._started is not None
        self._started.sum.wait()
        self._started = None
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
        for squares in self._write_sums:
            parts["writes"] = squares
        if scan_weights:
            (norms,), (peaks,) = self._scan()
            parts["weights"] = self._squares(norms)
            # Sums of the norms of shards are a norm too, though not that of the whole tensor.
            parts["peaks"] = peaks.to(device).double() * self._shares
            for flags in self._bad_buffers():
                parts["buffers"] = flags.to(device)
            for extents in self._extents():
                parts["extents"] = extents.double() * self._shares.repeat(3)
        if grads is not None:
            parts["grads"] = self._squares(self._norms_by_parameter(grads))
            if self._parts:
                parts["present"] = self._presence(grads)
        row = torch.empty(8 + len(self.flags), dtype=torch.float64, device=device)
        row[:5] = self._moments.row(device)
        row[5] = checksum(self._last_weights) if self._ranks.replicas else 0.0
        row[6] = rate
        row[7] = float(self.raised)
        for index, flag in enumerate(self.flags):
            row[8 + index] = flag
        shared = torch.cat([part.double() for part in parts.values()])
        lengths = {name: len(part) for name, part in parts.items()}
        return _Vector(self._ranks.sum(shared, row), lengths)

    def _presence(self, grads: Gradients) -> Tensor:
        """Returns 1 for each parameter that has a gradient, else 0."""
        if grads.complete:
            return torch.ones_like(self._shares)
        names = set(grads.names)
        return self._shares.new_tensor([name in names for name in self.names])

    def _norms_by_parameter(self, grads: Gradients) -> Tensor:
        """Returns the gradient norm of every parameter, 0 for one without a gradient."""
        if not grads.complete:
            by_name = dict(zip(grads.names, grads.tensors, strict=True))
            empty = torch.empty(0, device=self._samples.device)
            grads = Gradients(self.names, [by_name.get(n, empty) for n in self.names], False)
        (norms,) = self._gradient_norms(grads)
        return norms

    def _squares(self, norms: Tensor) -> Tensor:
        """Returns this rank's contribution to the squared norm of each parameter."""
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
        started, self._started = self._started, None
        names = grads.names
        vector = started or self._start(loss, loss_scale, scan_weights, rate, grads)
        own = self._gradient_norms(grads) if started else []
        self._moments.gradients_on_device(own[0] if own and grads.complete else None)
        # Replicas have the same stuck weights; with sharded weights it is not measured.
        stuck = self._rounding.count_stuck() if self._ranks.replicas else []
        groups = {"grads": own, "rows": rows, "also": also, "stuck": stuck}
        host = to_host({"vector": [vector.sum.wait()], **groups})
        parts, ranks = vector.split(host["vector"])
        if not started:
            norms = dict(zip(self.names, _roots(parts["grads"]), strict=True))
            if self._parts:
                # Of a parameter of which this rank has no part, others have a gradient.
                pairs = zip(self.names, parts["present"], strict=True)
                names = tuple(name for name, ranks in pairs if ranks)
            host["grads"] = [norms[n] for n in names]
        return Reading(
            loss=_mean(parts["loss"]),
            scale=_mean(parts["scale"]),
            grad_names=names,
            grad_norms=host["grads"],
            weight_norms=_roots(parts.get("weights", ())),
            updates=parts["updates"],
            writes=parts.get("writes", ()),
            peaks=parts.get("peaks", ()),
            buffers=parts.get("buffers", ()),
            extents=parts.get("extents", ()),
            moments=self._moments.judge_rows([row[:5] for row in ranks]),
            distributions=host["rows"],
            also=host["also"],
            stuck=host["stuck"],
            rank_weights=tuple(row[5] for row in ranks) if self._ranks.replicas else (),
            rank_rates=tuple(row[6] for row in ranks),
            raised_on=tuple(rank for rank, row in enumerate(ranks) if row[7]),
            rank_flags=tuple(tuple(row[8:]) for row in ranks),
        )


def checksum(sample: Tensor) -> Tensor:
    """Returns the sum of the bit patterns of fp32 numbers as integers, exact in any order."""
    return sample.view(torch.int32).sum(dtype=torch.float64)


def _present(value: Tensor | None, device: torch.device) -> Tensor:
    """Returns the value and a 1, or two zeros, so that every rank adds as many numbers."""
    if value is None:
        return torch.zeros(2, device=device)
    value = value.detach().to(device).double().reshape(1)
    return torch.cat([value, torch.ones_like(value)])


def _mean(pair: Sequence[float]) -> float | None:
    return pair[0] / pair[1] if pair[1] else None


def _roots(squares: Sequence[float]) -> list[float]:
    return [math.sqrt(x) if x >= 0 else math.nan for x in squares]
