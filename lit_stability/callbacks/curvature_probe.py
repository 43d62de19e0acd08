"""`CurvatureProbe`: how far the learning rate is from what the curvature of the loss bears."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.detectors.anomaly import require
from lit_stability.measurement.curvature import directional_curvature, plain_updates, slope_of
from lit_stability.measurement.step_stats import ProbeReading, StepStats
from lit_stability.trainer_internals import RecordedStep, sharing
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

log = logging.getLogger("lightning.pytorch.lit_stability")

RATIO = "curvature_ratio"


class CurvatureProbe(StabilityCallback):
    """Measures, every so often, the curvature of the loss along the update that comes next.

    The step is taken again beside training, in float32, from two places a little off the weights.
    Afterwards all is as it was: a run is bit-identical to one without the probe. The reading goes
    into ``StepStats.readings``, where `Curvature`, one of the monitor's default detectors,
    judges it; over several ranks it is the mean, which is exact for the mean of their losses:

    * ``curvature_ratio``: 1 at the edge, see `lit_stability.measurement.curvature`; absent where
      all gradients are 0.

    While the ratio is above 1 the next steps are measured too, `follow` at most, as it is by
    staying there that it foretells a spike. A measurement takes two forward and backward passes.
    It knows SGD, Adam and AdamW; with others, in manual optimization, under FSDP2, and where the
    step cannot be taken again, nothing is measured, and it is said once.

    Args:
        every: optimizer steps (Lightning's ``global_step``) between measurements.
        follow: steps in a row measured, where the ratio is above 1.

    Raises:
        ValueError: if an argument is less than 1; at `setup` without a `GradientMonitor` before it.
    """

    def __init__(self, *, every: int = 100, follow: int = 5) -> None:
        require(every >= 1, "every", every, "at least 1")
        require(follow >= 1, "follow", follow, "at least 1")
        self.every, self.follow = every, follow
        self._recorded_step = RecordedStep()
        self._in_a_row = 0
        self._obstacle: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether there is anything to be measured."""
        self._recorded_step.forget()
        self._in_a_row, self._obstacle = 0, None
        if not pl_module.automatic_optimization:
            self._give_up("in manual optimization a training_step cannot be run without its update")
        elif sharing(trainer) == "shards":
            self._give_up("under FSDP2 a rank has not the weights to take a step again")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, if it is of a step to be measured."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._recorded_step.forget()
        followed = 0 < self._in_a_row < self.follow
        if trainer.global_step % self.every == 0 or followed:
            self._recorded_step.batch_started(batch, batch_idx)

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | None:
        """The ratio of the step at hand; None if it is not its turn, on all ranks alike."""
        if self._recorded_step.obstacle(trainer) is not None:
            return None
        try:
            found = [] if self._obstacle else self._measure(trainer, pl_module)
        except Exception as error:
            # What is measured must never be what ends a run.
            self._give_up(f"{type(error).__name__}: {error}")
            found = []
        self._recorded_step.forget()
        return found

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """See whether to look again at the next step, by what all ranks have found."""
        readings = stats.readings_of(RATIO)
        high = bool(readings) and readings[0].value > 1.0
        self._in_a_row = self._in_a_row + 1 if high else 0

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> list[ProbeReading]:
        optimizer = trainer.optimizers[0]
        updates = plain_updates(optimizer, learning_rate_multiplier(optimizer).effective())
        places = [i for i, p in enumerate(pl_module.parameters()) if p in updates]
        if not places:
            return []
        originals = list(pl_module.parameters())
        ordered = [updates[originals[i]] for i in places]
        with self._recorded_step.rerun_losses(trainer, pl_module) as losses:
            copies = list(pl_module.parameters())
            curvature = directional_curvature(losses, [copies[i] for i in places], ordered)
        slope, bent = torch.stack([slope_of(updates).to(curvature.device), curvature]).tolist()
        ratio = bent / (2 * slope) if slope > 0 else math.nan
        return [ProbeReading(RATIO, "", ratio)] if math.isfinite(ratio) else []

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the batch."""
        self._recorded_step.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the batch."""
        self._recorded_step.forget()

    def _give_up(self, why: str) -> None:
        self._obstacle = why
        log.warning("CurvatureProbe measures nothing: %s", why)
