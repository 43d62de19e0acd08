"""Measures each optimizer step, at the right places of Lightning's loop. May import Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lit_stability.callbacks.gradient_monitor.failed_step import without_gradients
from lit_stability.callbacks.hooks import implements
from lit_stability.distributed.collectives import Ranks
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.distributed_step_meter import DistributedStepMeter
from lit_stability.measurement.norms import DeviceReadings
from lit_stability.measurement.step_meter import StepMeter
from lit_stability.measurement.step_stats import ProbeReading, StepStats, merged_readings
from lit_stability.measurement.watched_buffers import WatchedBuffers
from lit_stability.trainer_internals import (
    MeasuredClipping,
    RecordedStep,
    adapter_of,
    callbacks_of,
    clip_norm,
    ends_window,
    loss_scaler,
    parameters_of,
    step_failure,
    unscale,
)
from lit_stability.training_state.gradient_clipping import gradients_are_new
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from lit_stability.training_state.skipped_step import is_skipped, skip_gate

log = suite_logger()

ProbeAnswer: TypeAlias = list[ProbeReading] | DeviceReadings | None
"""What a probe returns: None for a step that it does not measure."""


class StepMeasurer:
    """One meter per optimizer, and the loss of the accumulation window.

    Args:
        trainer: at the start of its fit.
        pl_module: the module in training.
        ranks: the ranks that measure together; None for a single one.
        scan_weights_every: optimizer steps between full scans of the weights.
        details_every: optimizer steps between measurements of distributions; 0 for never.
        optimizer_replaced: called with the index of an optimizer that the program has replaced.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        ranks: Ranks | None,
        *,
        scan_weights_every: int,
        details_every: int,
        optimizer_replaced: Callable[[int], None],
    ) -> None:
        self._trainer = trainer
        self._module, self._ranks, self._adapter = pl_module, ranks, adapter_of(trainer)
        self._scan_every, self._details_every = scan_weights_every, details_every
        self._optimizer_replaced = optimizer_replaced
        self._buffers = WatchedBuffers(pl_module, self._adapter.weights_in_use)
        self._clipping = MeasuredClipping(trainer, pl_module)
        self._flagged = [c for c in callbacks_of(trainer) if implements(c, "rank_flag")]
        self.meters = {i: self._make(i, o) for i, o in enumerate(trainer.optimizers)}
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer)
            skip_gate(optimizer)
        self._loss: Tensor | None = None
        self._measured: set[int] = set()
        self._unmeasured: set[int] = set()
        """Indices of optimizers that came in the fit and have no meter."""
        self._epochs: dict[int, int] = {}
        """Epoch of the last measured step, by optimizer."""
        wanted = any(getattr(c, "needs_recorded_step", False) for c in callbacks_of(trainer))
        self.recorded_step = RecordedStep() if wanted else None
        """The current step, if a callback may need to run it again; else None."""

    def renew(self, trainer: Trainer) -> None:
        """Replaces the meters, after tensors were replaced; their counts go on."""
        # The plugin for the precision may be another one too.
        self._clipping.remove()
        self._clipping = MeasuredClipping(trainer, self._module)
        for index, optimizer in enumerate(trainer.optimizers):
            count = self.meters[index].count
            self.meters[index].forget()
            self.meters[index] = self._replaced(index, optimizer)
            self.meters[index].count = count

    def watch_writes(self) -> None:
        """Measures writes to the weights outside of optimizer steps from now on."""
        for meter in self.meters.values():
            meter.watches_writes = True

    def weights_rescaled(self) -> None:
        """Forgets the last weights: a callback has rescaled some as a part of the update."""
        for meter in self.meters.values():
            meter.weights_rescaled()

    def close(self) -> None:
        """Removes the hooks from the optimizers, and leaves the clipping to Lightning."""
        self._clipping.remove()
        for meter in self.meters.values():
            meter.close()

    def batch_started(self, batch: Any, batch_idx: int) -> None:
        """Records the batch that the next measurement belongs to."""
        self._measured.clear()
        self._clipping.measured(None)
        if self.recorded_step is not None:
            self.recorded_step.batch_started(batch, batch_idx)

    def batch_ended(self, trainer: Trainer) -> None:
        """Releases the recorded batches if an optimizer step was taken with this one."""
        if self.recorded_step is not None and ends_window(trainer):
            self.recorded_step.forget()

    def take_loss(self, trainer: Trainer, loss: Tensor, *, scan: bool) -> None:
        """Adds the loss of a batch; with the last of the window the ranks start to measure.

        Args:
            trainer: before backward.
            loss: of the batch.
            scan: whether to scan the weights even if no scan is due: while an incident is open,
                damage that recurs is found in the step in which it happens.
        """
        detached = self._adapter.scaled_loss(loss.detach())
        self._loss = detached if self._loss is None else self._loss + detached
        if self._ranks is None or not self._ranks.overlapped or not ends_window(trainer):
            return
        meter = self._meter(0, trainer.optimizers[0])
        assert isinstance(meter, DistributedStepMeter)
        self._tell_ranks(trainer, meter)
        meter.begin(
            self._loss,
            loss_scale=self._adapter.loss_scale(),
            learning_rates=learning_rate_multiplier(trainer.optimizers[0]).effective(),
            scan_weights=scan or self._is_due(meter, self._scan_every),
        )

    def measure(
        self, trainer: Trainer, optimizer: Optimizer, *, scan: bool, failed: bool = False
    ) -> StepStats | None:
        """Measures a step before its update; returns None for one that was measured already.

        Args:
            trainer: in the optimizer's step.
            optimizer: whose gradients to measure.
            scan: as in `take_loss`.
            failed: whether a ``training_step`` of this step raised: its loss and gradients mean
                nothing, and on one rank the weights are scanned. Several ranks have started to
                measure before they know it.
        """
        index = next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), None)
        if index is None:  # of another fit: one that failed has had no teardown
            return None
        if not self._can_measure(index, optimizer):
            return None
        if isinstance(optimizer, LBFGS) and index in self._measured:
            # Its closure runs many times per step; only the first run has the weights of the step.
            self._loss = None
            return None
        self._measured.add(index)
        gradients_are_new(optimizer)
        self._adapter.read_gradients()
        scaler = loss_scaler(trainer)
        if scaler is not None:
            unscale(scaler, optimizer)
        scale = learning_rate_multiplier(optimizer)
        meter = self._meter(index, optimizer)
        self._tell_ranks(trainer, meter)
        loss, self._loss = self._loss, None
        probes = [c for c in callbacks_of(trainer) if implements(c, "probe_readings")]
        probes = [] if failed else probes
        # A step without gradients, as where training_step returns None, may hide damaged weights.
        scan = scan or (failed and self._ranks is None) or is_skipped(optimizer)
        answers = [probe.probe_readings(trainer, self._module) for probe in probes]
        stats = meter.measure(
            trainer.global_step,
            loss,
            loss_scale=self._adapter.loss_scale(),
            learning_rates=scale.effective(),
            nominal_learning_rates=scale.nominal(),
            scan_weights=scan or self._is_due(meter, self._scan_every),
            details=self._is_due(meter, self._details_every),
            also=[each.numbers for each in answers if isinstance(each, DeviceReadings)],
            clip_norm=clip_norm(trainer),
            starts_epoch=self._starts_epoch(index, trainer.current_epoch),
            ends_epoch=trainer.is_last_batch,
        )
        self._clipping.measured(meter.measured)
        meter.measured = None
        if failed or stats.raised_on:
            return without_gradients(stats)
        readings = self._readings(answers, meter.also)
        return replace(stats, readings=tuple(readings)) if readings else stats

    def _tell_ranks(self, trainer: Trainer, meter: StepMeter) -> None:
        """Sets what all ranks learn of this one with the step."""
        meter.raised = step_failure(trainer) is not None
        meter.flags = [each.rank_flag(trainer, self._module) for each in self._flagged]

    def report_flags(self, trainer: Trainer, stats: StepStats) -> None:
        """Calls ``on_rank_flags`` of the callbacks that have flags.

        Args:
            trainer: in the optimizer's step.
            stats: what `measure` returned for it.
        """
        for index, each in enumerate(self._flagged):
            if implements(each, "on_rank_flags"):
                flags = [rank[index] for rank in stats.rank_flags]
                each.on_rank_flags(trainer, self._module, flags)

    def _starts_epoch(self, index: int, epoch: int) -> bool:
        last, self._epochs[index] = self._epochs.get(index, epoch), epoch
        return last != epoch

    def measure_state(self, trainer: Trainer) -> StepStats:
        """Measures weights and optimizer state after a ``training_step`` that was cut short.

        Its step is the one after those that were accepted in the same batch: they do not show that
        the batch can be trained on.
        """
        optimizer, self._loss = trainer.optimizers[0], None
        scale = learning_rate_multiplier(optimizer)
        meter = self._meter(0, optimizer)
        stats = meter.measure(
            trainer.global_step,
            None,
            learning_rates=scale.effective(),
            nominal_learning_rates=scale.nominal(),
            scan_weights=True,
        )
        meter.measured = None
        return without_gradients(stats)

    def _readings(
        self, answers: Sequence[ProbeAnswer], also: Sequence[float]
    ) -> list[ProbeReading]:
        """Returns what probes measured, as one over all ranks; all ranks call it alike."""
        if all(each is None for each in answers):
            return []
        own: list[ProbeReading] = []
        for each in answers:
            if isinstance(each, DeviceReadings):
                count = each.numbers.numel()
                own, also = [*own, *each.read(also[:count])], also[count:]
            else:
                own += each or []
        return own if self._ranks is None else merged_readings(self._ranks.gather(own))

    def _can_measure(self, index: int, optimizer: Optimizer) -> bool:
        """Returns whether an optimizer has a meter, or can have one in the place of another.

        The program may use more optimizers than at the start, or one of other tensors.
        """
        if index in self.meters and self.meters[index].optimizer is optimizer:
            return True
        named = self._adapter.named_parameters(self._module)
        own = {id(p) for p in parameters_of(optimizer)}
        if index in self.meters and any(id(p) in own for _, p in named):
            return True
        if index not in self._unmeasured:
            self._unmeasured.add(index)
            text = "the program uses optimizer %d (%s) since step %d: its steps are not monitored"
            log.info(text, index, type(optimizer).__name__, self._trainer.global_step)
        return False

    def _meter(self, index: int, optimizer: Optimizer) -> StepMeter:
        if self.meters[index].optimizer is not optimizer:
            self._optimizer_replaced(index)
            self.meters[index] = self._replaced(index, optimizer)
        elif self.meters[index].stale:
            self.meters[index] = self._replaced(index, optimizer)
        return self.meters[index]

    def _replaced(self, index: int, optimizer: Optimizer) -> StepMeter:
        """Returns a new meter that watches what the present one watches."""
        old, new = self.meters[index], self._make(index, optimizer)
        new.scanned_at = old.scanned_at
        new.watches_writes = old.watches_writes
        old.close()
        return new

    def _make(self, index: int, optimizer: Optimizer) -> StepMeter:
        named = self._adapter.named_parameters(self._module)
        buffers = self._buffers if index == 0 else None
        if self._ranks is None:
            meter = StepMeter(named, optimizer, index, buffers)
        else:
            shares = self._adapter.part_shares(self._module)
            meter = DistributedStepMeter(named, optimizer, index, self._ranks, buffers, shares)
        meter.keeps_gradients = self._clipping.active
        # Each rank has as many in its row, also where a step is measured after it was cut short.
        meter.flags = [0.0] * len(self._flagged)
        return meter

    @staticmethod
    def _is_due(meter: StepMeter, every: int) -> bool:
        return every > 0 and (meter.count + 1) % every == 0
