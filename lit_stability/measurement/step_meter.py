"""Measures everything that the detectors need, once per optimizer step.

Takes one foreach pass over the gradients, one gather of a fixed sample of weights and second
moments, and one copy to the host. May import torch but neither Lightning nor detectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lit_stability.distributed.dtensor import local
from lit_stability.measurement.gradient_distribution import details_of, sampled_distribution
from lit_stability.measurement.lost_updates import Rounding
from lit_stability.measurement.norms import (
    BatchedNorms,
    Gradients,
    MeasuredGradients,
    gradients_of,
    non_finite,
    norms_of,
    to_host,
    total,
)
from lit_stability.measurement.number_formats import is_measurable, which_are_finite
from lit_stability.measurement.optimizer_moments import MomentStats, OptimizerMoments
from lit_stability.measurement.second_moment_ratio import SecondMomentRatio
from lit_stability.measurement.step_stats import StepStats, WeightMoves
from lit_stability.measurement.watched_buffers import WatchedBuffers
from lit_stability.measurement.weight_sampling import WeightSampler


@dataclass(kw_only=True)
class Reading:
    """The numbers of one step on the host, the same on all ranks."""

    loss: float | None
    """Loss times ``scale``; None if no backward pass was observed."""
    scale: float | None
    grad_names: tuple[str, ...]
    """Parameters that have a gradient, on any rank."""
    grad_norms: Sequence[float]
    weight_norms: Sequence[float]
    """Norm of each weight; empty if the weights were not scanned."""
    updates: Sequence[float]
    """Squared norms of the last update and of the weights before it; empty if unknown."""
    writes: Sequence[float]
    """Squared norm, for each weight, of what changed after the last update ended, then of the
    weight itself; empty if that is not watched."""
    buffers: Sequence[float]
    """1 for each watched buffer that is non-finite, else 0; empty if they were not scanned."""
    peaks: Sequence[float]
    """Largest absolute value of each weight; empty if the weights were not scanned."""
    extents: Sequence[float]
    """How far each weight moved since the last scan, see `WeightSampler.extents`; empty if
    unknown."""
    moments: MomentStats
    distributions: Sequence[float]
    also: Sequence[float]
    """Numbers that other callbacks had copied to the host, in their order."""
    stuck: Sequence[float] = ()
    """Counts of stuck 16-bit weights, and of those with a steady gradient sign; or empty."""
    rank_weights: tuple[float, ...] = ()
    rank_rates: tuple[float, ...] = ()
    rank_flags: tuple[tuple[float, ...], ...] = ()
    raised_on: tuple[int, ...] = ()


class StepMeter:
    """Measures the parameters of one optimizer at every step.

    Args:
        named_parameters: ``(name, parameter)`` pairs; skipped are those that the optimizer lacks,
            frozen ones that are non-finite, such as a mask of -inf, those without elements, and
            those that cannot be measured, such as frozen int8 weights.
        optimizer: the optimizer whose updates are measured.
        index: position of the optimizer in ``trainer.optimizers``.
        buffers: the buffers to scan together with the weights, or None.
        parts: whether the parameters are parts of those of several ranks: then none is skipped
            for its value or size.

    Raises:
        ValueError: if the optimizer holds none of the parameters.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        optimizer: Optimizer,
        index: int = 0,
        buffers: WatchedBuffers | None = None,
        *,
        parts: bool = False,
    ) -> None:
        self._held = [p for group in optimizer.param_groups for p in group["params"]]
        held = {id(p) for p in self._held}
        own = [(n, p) for n, p in named_parameters if id(p) in held and is_measurable(p)]
        # Without elements nothing is dead; a sharded parameter counts those of all ranks.
        found = [(n, p) for n, p in own if parts or p.numel()]
        # All ranks must measure the same parameters.
        constants = frozenset() if parts else _constants(p for _, p in found if not p.requires_grad)
        pairs = [(n, p) for n, p in found if id(p) not in constants]
        if not pairs:
            raise ValueError(
                f"optimizer {index} ({type(optimizer).__name__}) holds no parameter of "
                "the module; pass it `module.parameters()`"
            )
        self._buffers = buffers
        self.names = tuple(n for n, _ in pairs)
        self.parameters = [p for _, p in pairs]
        self.optimizer = optimizer
        self.index = index
        self.count = 0
        """Number of measured steps."""
        self.also: Sequence[float] = ()
        """Numbers of ``also`` that were copied to the host with the last step."""
        self.flags: Sequence[float] = ()
        """Numbers of this rank that all ranks learn with the next step; as many on each."""
        self.raised = False
        """Whether ``training_step`` raised on this rank, which all ranks learn with the step."""
        self._samples = WeightSampler(self.parameters)
        self._batched = BatchedNorms(self.parameters)
        self._moments = OptimizerMoments(self.names, self.parameters, optimizer)
        self._rounding = Rounding(self.parameters)
        self._moment_ratio = SecondMomentRatio()
        self.watches_writes = False
        """Whether writes to the weights outside of the optimizer's step are measured; costs one
        more sample of the weights for each step, so it begins when there is a reason."""
        self.keeps_gradients = False
        """Whether `measured` is set, for a clip that comes after the measurement."""
        self.measured: MeasuredGradients | None = None
        """The gradients of the last step, unless some are missing, sparse or not plain tensors."""
        self._last_norms: list[Tensor] = []
        self._ends_epoch = False
        self._handle = optimizer.register_step_post_hook(self._update_ended)
        self._updated_weights: Tensor | None = None
        self.forget()
        self.scanned_at: int | None = -1
        """Step of the last scan; -1 before the first; None if a good state was just restored."""

    @property
    def stale(self) -> bool:
        """Whether the optimizer has gained, lost or exchanged parameters, as in an unfreezing."""
        groups = self.optimizer.param_groups
        if sum(len(group["params"]) for group in groups) != len(self._held):
            return True
        # In each step, so without a list in between.
        return any(map(is_not, chain.from_iterable(g["params"] for g in groups), self._held))

    def close(self) -> None:
        """Removes the hook from the optimizer."""
        self._handle.remove()

    def _update_ended(self, *_: Any) -> None:
        if self.watches_writes or self._ends_epoch:
            with torch.no_grad():
                self._updated_weights = self._samples.gather()

    def forget(self) -> None:
        """Clears the state of the last step, after the weights were restored."""
        self._updated_weights = None
        self._write_sums: list[Tensor] = []
        self.scanned_at = None
        self.weights_rescaled()
        self._moments.forget()
        self._moment_ratio.forget()
        self._last_lr = self._last_nominal_lr = 0.0

    def weights_rescaled(self) -> None:
        """Forgets the last weights only: the next update, and moves, cannot be measured."""
        self._last_weights: Tensor | None = None
        self._last_square: Tensor | None = None
        self._scanned: tuple[int, Sequence[float], Sequence[float]] | None = None
        self._scanned_weights: Tensor | None = None
        self._rounding.forget()

    @torch.no_grad()
    def measure(
        self,
        step: int,
        loss: Tensor | None,
        *,
        loss_scale: Tensor | None = None,
        learning_rates: Sequence[float] = (),
        nominal_learning_rates: Sequence[float] = (),
        scan_weights: bool = False,
        details: bool = False,
        also: Sequence[Tensor] = (),
        clip_norm: float | None = None,
        starts_epoch: bool = False,
        ends_epoch: bool = False,
    ) -> StepStats:
        """Measures the current gradients, and the previous update from the change of the weights.

        Args:
            step: optimizer steps taken so far.
            loss: the step's loss, a scalar on any device, or None.
            loss_scale: factor by which the loss was multiplied, a scalar, or None.
            learning_rates: effective learning rate of each group.
            nominal_learning_rates: learning rate of each group as the scheduler set it.
            scan_weights: whether to read all weights, not only the sample.
            details: whether to fill ``StepStats.details``.
            also: other one-dimensional tensors to copy to the host, into the attribute `also`.
            clip_norm: norm to which the Trainer clips the gradients afterwards, or None.
            starts_epoch: whether this is the first step of an epoch, after another epoch.
            ends_epoch: whether this is the last step of an epoch: hooks that run between epochs may
                write to the weights.
        """
        self._ends_epoch = ends_epoch
        grads = gradients_of(self.names, self.parameters)
        rows = [sampled_distribution(g) for g in grads.tensors] if details else []
        read = self._read(loss, loss_scale, scan_weights, sum(learning_rates), grads, rows, also)
        self.also = read.also
        grad_norms = tuple(read.grad_norms)
        if self.keeps_gradients:
            self.measured = self._measured(grads, total(grad_norms))
        self._moments.gradients(read.grad_names, grad_norms)
        norms = dict(zip(read.grad_names, grad_norms, strict=True))
        rms, rms_name = self._second_moment_ratio(norms, read.updates)
        bad_weights = non_finite(self.names, read.weight_norms)
        bad_in_use, bad_buffers = self._names_of(read.buffers)
        stats = StepStats(
            step=step,
            loss=_unscaled(read.loss, read.scale),
            has_loss=read.loss is not None,
            loss_scale=read.scale,
            grad_norm=total(grad_norms),
            optimizer=self.index,
            names=read.grad_names,
            grad_norms=grad_norms,
            learning_rates=tuple(learning_rates),
            nominal_learning_rates=tuple(nominal_learning_rates),
            update_ratio=_ratio(read.updates),
            update_learning_rate=self._last_lr,
            update_nominal_learning_rate=self._last_nominal_lr,
            outside_writes=self._outside_writes(read.writes),
            starts_epoch=starts_epoch,
            clip_norm=clip_norm,
            stuck_share=read.stuck[0] / read.stuck[1] if read.stuck and read.stuck[1] else None,
            moment_ratio=read.moments.ratio,
            moment_name=read.moments.name,
            moment_growth=read.moments.growth,
            moment_growth_name=read.moments.growth_name,
            moment_rms=rms,
            moment_rms_name=rms_name,
            bad_momentum=read.moments.bad_momentum,
            weight_norm=total(read.weight_norms) if scan_weights else None,
            weight_norms=tuple(zip(self.names, read.weight_norms, strict=False)),
            weight_moves=self._moves(read),
            bad_weights=tuple(dict.fromkeys((*bad_weights, *bad_in_use))),
            bad_buffers=bad_buffers,
            last_scan=self.scanned_at if scan_weights else None,
            details=details_of(grads.names, [norms[n] for n in grads.names], read.distributions),
            rank_weights=read.rank_weights,
            rank_rates=read.rank_rates,
            rank_flags=read.rank_flags,
            raised_on=read.raised_on,
        )
        self.count += 1
        if scan_weights:
            self.scanned_at = step
        if read.weight_norms:
            self._scanned = (step, read.weight_norms, read.peaks)
        self.expect(learning_rates)
        self._last_nominal_lr = max(nominal_learning_rates, default=0.0)
        return stats

    def _outside_writes(self, squares: Sequence[float]) -> tuple[tuple[str, float], ...]:
        count = len(squares) // 2
        rows = zip(self.names, squares[:count], squares[count:], strict=False)
        return tuple((name, _root_ratio(moved, whole)) for name, moved, whole in rows if moved)

    def _moves(self, read: Reading) -> WeightMoves | None:
        # Learning rate and gradient tell nothing of how far a line search moves the weights.
        searches = isinstance(self.optimizer, LBFGS)
        if self._scanned is None or not read.extents or searches:
            return None
        since, norms, peaks = self._scanned
        count = len(self.names)
        return WeightMoves(
            since=since,
            norms=tuple(norms),
            peaks=tuple(zip(peaks, read.peaks, strict=True)),
            distances=tuple(read.extents[:count]),
            farthest=tuple(
                zip(read.extents[count : 2 * count], read.extents[2 * count :], strict=True)
            ),
        )

    def expect(self, learning_rates: Sequence[float]) -> None:
        """Sets the learning rates of the next update, if they changed after `measure`."""
        self._last_lr = max(learning_rates, default=0.0)

    @torch.no_grad()
    def bad_weights(self) -> tuple[str, ...]:
        """Returns the names of parameters with a non-finite weight, among those of this rank."""
        weights = to_host({"norms": norms_of(self._local_weights())})["norms"]
        return non_finite(self.names, weights)

    @torch.no_grad()
    def bad_state(self) -> tuple[str, ...]:
        """Returns the names of the rank's non-finite weights, and buffers that were finite."""
        norms, flags = norms_of(self._local_weights()), self._bad_buffers()
        host = to_host({"norms": norms, "flags": flags})
        weights, buffers = self._names_of(host["flags"])
        return (*non_finite(self.names, host["norms"]), *weights, *buffers)

    @torch.no_grad()
    def audit(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns names of parameters with a non-finite weight, and with a non-finite moment.

        Reads all that this rank holds and copies to the host, so it is for incidents and not for
        every step.
        """
        owners, tensors = [], []
        for name, p in zip(self.names, self.parameters, strict=True):
            for value in (self.optimizer.state.get(p) or {}).values():
                if isinstance(value, Tensor) and is_measurable(value):
                    owners.append(name)
                    tensors.append(local(value))
        # By element and not by norm: that of a second moment of 1e20 overflows.
        bad = (n for n, ok in zip(owners, which_are_finite(tensors), strict=True) if not ok)
        return self.bad_weights(), tuple(dict.fromkeys(bad))

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
        weights, peaks = self._scan() if scan_weights else ([], [])
        host = to_host(
            {
                "loss": _scalar(loss),
                "scale": _scalar(loss_scale),
                "grads": self._gradient_norms(grads),
                "weights": weights,
                "rows": rows,
                "also": also,
                "updates": self._update_sums(),
                "writes": self._write_sums,
                "extents": self._extents() if scan_weights else [],
                "peaks": peaks,
                "buffers": self._bad_buffers() if scan_weights else [],
                "moments": self._moments.sums(),
                "stuck": self._rounding.count_stuck(),
            }
        )
        return Reading(
            loss=host["loss"][0] if host["loss"] else None,
            scale=host["scale"][0] if host["scale"] else None,
            grad_names=grads.names,
            grad_norms=host["grads"],
            weight_norms=host["weights"],
            updates=host["updates"],
            writes=host["writes"],
            peaks=host["peaks"],
            buffers=host["buffers"],
            extents=host["extents"],
            moments=self._moments.judge(host["moments"]),
            distributions=host["rows"],
            also=host["also"],
            stuck=host["stuck"],
            rank_flags=(tuple(self.flags),),
        )

    def _gradient_norms(self, grads: Gradients) -> list[Tensor]:
        complete = grads.complete
        norms = self._batched.norms(grads.tensors) if complete else norms_of(grads.tensors)
        self._last_norms = norms
        return norms

    def _measured(self, grads: Gradients, norm: float) -> MeasuredGradients | None:
        if not grads.complete:
            return None
        versions = [grad._version for grad in grads.tensors]
        stacked = self._batched.stacked
        return MeasuredGradients(grads.tensors, self._last_norms[0], norm, stacked, versions)

    def _scan(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns norms and peaks of all weights."""
        return self._batched.norms_and_peaks(self._local_weights())

    def _bad_buffers(self) -> list[Tensor]:
        return [] if self._buffers is None else self._buffers.flags()

    def _names_of(self, flags: Sequence[float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ((), ()) if self._buffers is None else self._buffers.names_of(flags)

    def _second_moment_ratio(
        self, norms: dict[str, float], updates: Sequence[float]
    ) -> tuple[float | None, str]:
        """Returns the second-moment ratio and its parameter, (None, "") if there is none."""
        # A skipped step leaves the sampled weights unchanged.
        taken = bool(updates) and updates[0] > 0
        return self._moment_ratio.measure(norms, self._moments.decays, taken=taken) or (None, "")

    def _local_weights(self) -> list[Tensor]:
        return [local(p) for p in self.parameters]

    def _update_sums(self) -> list[Tensor]:
        """Returns sampled squared norms of the last update and of the weights before it."""
        updated, self._updated_weights = self._updated_weights, None
        if updated is not None:
            self._samples.recheck()
        now, last = self._samples.gather(), self._last_weights
        self._write_sums = [] if updated is None else [self._writes(updated, now)]
        before = self._last_square
        moved_to = now if updated is None else updated
        squares = self._samples.square_sums(
            now[None] if last is None else torch.stack((now, moved_to - last))
        )
        self._last_weights, self._last_square = now, squares[:1]
        return [] if before is None else [squares[1:], before]

    def _writes(self, updated: Tensor, now: Tensor) -> Tensor:
        """Returns squared norms of what changed after the update, then of the updated weights."""
        moved = self._samples.tensor_square_sums(now - updated)
        return torch.cat([moved, self._samples.tensor_square_sums(updated)])

    def _extents(self) -> list[Tensor]:
        """Returns the moves of the weights since the last scan; call it after `_update_sums`."""
        last, self._scanned_weights = self._scanned_weights, self._last_weights
        if last is None or self._last_weights is None:
            return []
        return [self._samples.extents(self._last_weights - last)]


def _ratio(squares: Sequence[float]) -> float | None:
    return math.sqrt(squares[0] / squares[1]) if squares and squares[1] > 0 else None


def _root_ratio(moved: float, whole: float) -> float:
    return math.sqrt(moved / whole) if whole > 0 else math.inf


def _scalar(value: Tensor | None) -> list[Tensor]:
    return [] if value is None else [value.detach().float().reshape(1)]


def _unscaled(loss: float | None, scale: float | None) -> float:
    if loss is None:
        return math.nan
    return loss if not scale else loss / scale


@torch.no_grad()
def _constants(frozen: Iterable[Tensor]) -> frozenset[int]:
    """Returns the ids of frozen parameters that are non-finite, so that no update can be measured.

    They are not trained, so nothing that happens to the run shows in them.
    """
    parameters = [p for p in frozen if p.is_floating_point()]
    norms = to_host({"norms": norms_of([local(p) for p in parameters])})["norms"]
    pairs = zip(parameters, norms, strict=True)
    return frozenset(id(p) for p, norm in pairs if not math.isfinite(norm))
