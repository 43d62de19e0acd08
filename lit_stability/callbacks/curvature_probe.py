"""`CurvatureProbe`: compares the learning rate with the limit that the loss curvature sets."""

import math
from typing import Any

import torch

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.detectors.anomaly import require
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.curvature import directional_curvature, plain_updates, slope_of
from lit_stability.measurement.step_stats import ProbeReading, StepStats
from lit_stability.trainer_internals import RecordedStep, sharing
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

log = suite_logger()

RATIO = "curvature_ratio"


class CurvatureProbe(StabilityCallback):
    """Measures the curvature of the loss along the next update, on one step in `every`.

    The step is run again in isolation, in float32, at two points close to the weights. All state is
    restored afterwards: a run is bit-identical to one without the probe. The reading is stored in
    ``StepStats.readings``, where `Curvature`, one of the monitor's default detectors, checks it.
    Over several ranks it is averaged, which is exact for the mean of their losses:

    * ``curvature_ratio``: 1 at the edge of stability, see `lit_stability.measurement.curvature`;
      absent if all gradients are 0.

    While the ratio is above 1, the next steps are measured too, at most `follow`, because only a
    ratio that stays above 1 predicts a spike. A measurement costs two forward and backward passes.
    SGD, Adam and AdamW are supported. With other optimizers, in manual optimization, with shards,
    and if the step cannot be run again, nothing is measured, and the probe warns once.

    >>> from lit_stability import stability_callbacks
    >>> callbacks = [*stability_callbacks(), CurvatureProbe(every=200)]

    Args:
        every: optimizer steps (Lightning's ``global_step``) between measurements.
        follow: most consecutive steps that are measured while the ratio is above 1.

    Raises:
        ValueError: if an argument is less than 1; at `setup` without a `GradientMonitor` before it.
    """

    def __init__(self, *, every: int = 100, follow: int = 5) -> None:
        require(every >= 1, "every", every, "at least 1")
        require(follow >= 1, "follow", follow, "at least 1")
        self.every, self.follow = every, follow
        self._recorded_step = RecordedStep()
        self._high_in_a_row = 0
        self._obstacle: str | None = None

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_recorded_step": RecordedStep()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a trainer without a `GradientMonitor` before this callback."""
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks whether the curvature can be measured in this fit."""
        self._recorded_step.forget()
        self._high_in_a_row, self._obstacle = 0, None
        if not pl_module.automatic_optimization:
            self._disable("in manual optimization a training_step cannot be run without its update")
        elif sharing(trainer) == "shards":
            self._disable("with sharded weights a rank lacks those that a step needs to run again")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch, if its step is measured."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._recorded_step.forget()
        followed = 0 < self._high_in_a_row < self.follow
        if trainer.global_step % self.every == 0 or followed:
            self._recorded_step.batch_started(batch, batch_idx)

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | None:
        """Returns the ratio of this step; None, on all ranks, if the step is not measured."""
        if self._recorded_step.obstacle(trainer) is not None:
            return None
        try:
            readings = [] if self._obstacle else self._measure(trainer, pl_module)
        except Exception as error:
            # A failed measurement must never end the run.
            self._disable(f"{type(error).__name__}: {error}")
            readings = []
        self._recorded_step.forget()
        return readings

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Counts consecutive ratios above 1, from what all ranks measured together."""
        readings = stats.readings_of(RATIO)
        high = bool(readings) and readings[0].value > 1.0
        self._high_in_a_row = self._high_in_a_row + 1 if high else 0

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> list[ProbeReading]:
        optimizer = trainer.optimizers[0]
        updates = plain_updates(optimizer, learning_rate_multiplier(optimizer).effective())
        indices = [i for i, p in enumerate(pl_module.parameters()) if p in updates]
        if not indices:
            return []
        originals = list(pl_module.parameters())
        ordered = [updates[originals[i]] for i in indices]
        with self._recorded_step.rerun_losses(trainer, pl_module) as losses:
            copies = list(pl_module.parameters())
            curvature = directional_curvature(losses, [copies[i] for i in indices], ordered)
        slope, curvature_value = torch.stack(
            [slope_of(updates).to(curvature.device), curvature]
        ).tolist()
        ratio = curvature_value / (2 * slope) if slope > 0 else math.nan
        return [ProbeReading(RATIO, "", ratio)] if math.isfinite(ratio) else []

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Releases the batch."""
        self._recorded_step.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Releases the batch."""
        self._recorded_step.forget()

    def _disable(self, reason: str) -> None:
        self._obstacle = reason
        log.warning("CurvatureProbe is off for this fit: %s", reason)
