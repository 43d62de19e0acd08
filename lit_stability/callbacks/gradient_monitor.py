"""`GradientMonitor`: measures once per optimizer step and opens an incident where one is due."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lit_stability.callbacks.dispatch import call_hook
from lit_stability.callbacks.reporting import Reporter
from lit_stability.detectors import (
    Anomaly,
    Detector,
    LayerBounds,
    default_detectors,
    with_damage,
)
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.lr_scale import learning_rate_scale
from lit_stability.meter import StepMeter
from lit_stability.stats import StepStats
from lit_stability.trainer_state import (
    log_every,
    loss_scaler,
    unscale,
)


class GradientMonitor(Callback):
    """Watches loss, gradients, weights and updates of every optimizer step; changes nothing.

    Each step is measured before its update: accumulated, unscaled, unclipped. A step that passes
    all detectors is offered to the callbacks as ``on_healthy_step``; one that does not opens an
    `Incident`, offered as ``on_incident``. Without a callback that responds the step is taken as
    it is. An incident is closed after ``close_after`` healthy steps; a burst is one incident.

    Metrics recorded, every ``trainer.log_every_n_steps`` steps, to every logger:

    * ``stability/grad_norm``: norm of all gradients, before clipping.
    * ``stability/update_ratio``: norm of the previous update over the norm of the weights, from a
      sample; absent on the first step.
    * ``stability/learning_rate``: largest effective learning rate of the groups.
    * ``stability/learning_rate_factor``: effective over nominal learning rate, 1 when untouched.
    * ``stability/loss_scale``: factor of the loss scaler; only in fp16.
    * ``stability/incidents``: incidents so far.

    With several optimizers, those of the second carry ``_1`` and so on. Incidents go to
    ``incidents.jsonl`` in ``trainer.log_dir`` and, as markdown, to the loggers that take text.

    Args:
        detectors: what to ask, in order, the first objection counts; None for the default set.
        layer_bounds: glob of parameter names -> largest gradient norm, or the smallest and the
            largest, on top of the detectors; see `LayerBounds`.
        close_after: healthy steps that close an incident.
        scan_weights_every: optimizer steps between full scans of the weights for NaN and Inf.
        details_every: optimizer steps between measurements of every parameter's gradient mean,
            standard deviation, range and share of zeros; 0 for never.
        history: details kept for `details`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        detectors: list[Detector] | None = None,
        layer_bounds: dict[str, float | tuple[float, float]] | None = None,
        close_after: int = 10,
        scan_weights_every: int = 10,
        details_every: int = 50,
        history: int = 20,
    ) -> None:
        for name, value in (
            ("close_after", close_after),
            ("scan_weights_every", scan_weights_every),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if details_every < 0:
            raise ValueError(f"details_every must be 0 (never) or more, got {details_every!r}")
        self.detectors = default_detectors() if detectors is None else list(detectors)
        if layer_bounds:
            self.detectors.append(LayerBounds(layer_bounds))
        self.close_after = close_after
        self.scan_weights_every = scan_weights_every
        self.details_every = details_every
        self.details: deque[StepStats] = deque(maxlen=history)
        """The last measurements that carry details."""
        self.incidents: list[Incident] = []
        """Incidents of this fit."""
        self.current: Incident | None = None
        """The incident that is open, if one is."""
        self._count = 0
        self._healthy = 0
        self._sets: dict[int, list[Detector]] = {}
        self._restored: Mapping[str, Any] = {}
        self._meters: dict[int, StepMeter] = {}
        self._loss: Tensor | None = None
        self._measured: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare one meter and one set of detectors per optimizer."""
        named = list(pl_module.named_parameters())
        self._meters = {i: StepMeter(named, o, i) for i, o in enumerate(trainer.optimizers)}
        for optimizer in trainer.optimizers:
            learning_rate_scale(optimizer)
        self._sets = {i: copy.deepcopy(self.detectors) for i in self._meters}
        self._load_detectors(self._restored)
        self._restored = {}
        self.incidents, self.current, self._loss = [], None, None
        self._reporter = Reporter(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Another batch, another measurement."""
        self._measured.clear()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Add up the loss of the accumulation window."""
        detached = loss.detach()
        self._loss = detached if self._loss is None else self._loss + detached

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, ask, and pass the verdict on."""
        index = next(i for i, o in enumerate(trainer.optimizers) if o is optimizer)
        if isinstance(optimizer, LBFGS):
            # Its closure runs many times per step; the first run sees the state of the step.
            if index in self._measured:
                self._loss = None
                return
            self._measured.add(index)
        stats = self._measure(trainer, index, optimizer)
        anomaly = self._ask(stats)
        if anomaly is not None:
            weights, moments = self._meters[index].audit()
            anomaly = with_damage(anomaly, weights, moments)
            self._raise(trainer, pl_module, anomaly, stats)
        if anomaly is None or anomaly.observe_only:
            self._accept(trainer, pl_module, stats)

    def _measure(self, trainer: Trainer, index: int, optimizer: Optimizer) -> StepStats:
        scaler = loss_scaler(trainer)
        if scaler is not None:
            unscale(scaler, optimizer)
        scale = learning_rate_scale(optimizer)
        meter = self._meters[index]
        if meter.stale:
            named = trainer.lightning_module.named_parameters()
            meter = self._meters[index] = StepMeter(named, optimizer, index)
        count, every = meter.count + 1, self.details_every
        stats = meter.measure(
            trainer.global_step,
            self._loss,
            loss_scale=None if scaler is None else scaler._scale,
            learning_rates=scale.effective(),
            nominal_learning_rates=scale.nominal(),
            # While an incident is open, at every step: what returns is to be found at its origin.
            scan_weights=count % self.scan_weights_every == 0 or self.current is not None,
            details=every > 0 and count % every == 0,
        )
        self._loss = None
        if stats.details:
            self.details.append(stats)
        return stats

    def _ask(self, stats: StepStats) -> Anomaly | None:
        """The first objection; one that only asks to be told of gives way to any other."""
        told: Anomaly | None = None
        for detector in self._sets[stats.optimizer]:
            regimes = getattr(detector, "regimes", 0)
            anomaly = detector.check(stats)
            if anomaly is not None and not anomaly.observe_only:
                return anomaly
            told = told or anomaly
            if getattr(detector, "regimes", 0) > regimes:
                self._reporter.say(
                    f"step {stats.step}: {type(detector).__name__} accepts the values of late as "
                    "the new normal and learns anew"
                )
        return told

    def _accept(self, trainer: Trainer, pl_module: LightningModule, stats: StepStats) -> None:
        for detector in self._sets[stats.optimizer]:
            detector.update(stats)
        if self._meters[stats.optimizer].count % log_every(trainer) == 0:
            self._reporter.step(stats, self._count)
        self._healthy += 1
        call_hook("on_healthy_step", trainer, pl_module, stats)
        if self.current is None or self._healthy < self.close_after:
            return
        # A rollback comes by the step of the anomaly again: it is not over before.
        if stats.step >= self.current.anomaly.step + self.close_after:
            outcome = "recovered" if self.current.responses else "observed"
            self._close(trainer, pl_module, outcome)

    def _raise(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly, stats: StepStats
    ) -> None:
        self._healthy = 0
        opening = self.current is None
        if self.current is None:
            self._count += 1
            self.current = Incident(
                self._count,
                anomaly,
                epoch=trainer.current_epoch,
                batch_idx=trainer.fit_loop.epoch_loop.batch_idx,
                record=self._reporter.record_path,
            )
            self.incidents.append(self.current)
        else:
            self.current.strike(anomaly)
        self.current.stats = stats
        call_hook("on_incident", trainer, pl_module, self.current)
        scale = learning_rate_scale(trainer.optimizers[stats.optimizer])
        self._meters[stats.optimizer].expect(scale.effective())
        if opening:
            self._reporter.opened(self.current)

    def _close(self, trainer: Trainer, pl_module: LightningModule, outcome: Any) -> None:
        incident, self.current = self.current, None
        if incident is None:
            return
        incident.outcome, incident.closed_step = outcome, trainer.global_step
        self._reporter.closed(incident)
        call_hook("on_incident_closed", trainer, pl_module, incident)

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights were put back: the next update cannot be measured against the last."""
        for meter in self._meters.values():
            meter.forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close what is open and print the summary."""
        self._close(trainer, pl_module, "unresolved")
        self._reporter.summary(self.incidents)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep the record complete when the fit ends in an exception."""
        if not self._meters:
            return
        outcome = "stopped" if isinstance(exception, TrainingStopped) else "unresolved"
        self._close(trainer, pl_module, outcome)
        self._reporter.summary(self.incidents)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so when somebody saves weights that are non-finite, outside of an incident."""
        if self.current is not None:
            return
        bad = [name for meter in self._meters.values() for name in meter.audit()[0]]
        if bad:
            self._reporter.say(
                f"a checkpoint saved at step {trainer.global_step} holds non-finite weights, first "
                f"{bad[0]}: do not go on from it"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the parameters."""
        self._meters = {}

    def rewindable_state(self) -> dict[str, Any]:
        """The detectors' windows."""
        return {str(i): [d.state_dict() for d in found] for i, found in self._sets.items()}

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Put the detectors' windows back."""
        self._load_detectors(state)

    def _load_detectors(self, state: Mapping[str, Any]) -> None:
        for index, saved in state.items():
            found = self._sets.get(int(index), [])
            if len(found) == len(saved):
                for detector, detector_state in zip(found, saved, strict=True):
                    detector.load_state_dict(detector_state)

    def state_dict(self) -> dict[str, Any]:
        """Incidents so far and the detectors' windows."""
        return {
            "incidents": self._count,
            "detectors": self.rewindable_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back; the windows once the detectors exist."""
        self._count = int(state_dict["incidents"])
        self._restored = state_dict["detectors"]
