"""`NonFiniteLocator`: names the operation in which a NaN or Inf was born."""

from __future__ import annotations

import logging

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import (
    gather_of,
    require_monitor,
    require_supported_strategy,
)
from lit_stability.diagnosis.nonfinite import NonFiniteOrigin
from lit_stability.incidents import Incident

log = logging.getLogger("lightning.pytorch.lit_stability")

_SOUGHT = ("non-finite loss", "non-finite gradient", "loss-scale collapse", "infinite loss")


class NonFiniteLocator(StabilityCallback):
    """Takes a non-finite step again beside training, and finds where its NaN or Inf was made.

    The incident is given an ``origin``: module, operation, source line, forward or backward pass,
    ranges of what went in, and what to try; see `locate_nonfinite`. It is in the line on the
    console, in the record and in the report. Only the first strike of an incident is looked into,
    in 0.4 to 1.3 times the time of a forward and backward pass; weights, buffers, gradients,
    generators and metrics are as before afterwards. Healthy steps cost the generators' states, some
    0.1 ms.

    On several ranks each looks into its own batch, and the first that finds something is heard.

    A NaN that came from outside is not found again; that is evidence too. In manual optimization a
    step cannot be taken again, and nothing is said. Attributes of the module are put back; what its
    ``training_step`` writes to further objects, or to files, it writes once more.
    """

    needs_recorded_step = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it.
            RuntimeError: under a strategy that was not tried.
        """
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Look into the first strike."""
        sought = incident.occurrences == 1 and incident.anomaly.kind in _SOUGHT
        if not sought or incident.recorded_step.obstacle(trainer) is not None:
            return
        found: list[NonFiniteOrigin | None] = gather_of(trainer)(
            self._locate(trainer, pl_module, incident)
        )
        incident.origin = next((each for each in found if each is not None), None)
        if incident.origin is None:
            incident.evidence.append("taken again beside training, the step is finite")

    @staticmethod
    def _locate(
        trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> NonFiniteOrigin | None:
        try:
            origin: NonFiniteOrigin | None = incident.recorded_step.locate(
                trainer, pl_module, gather_of(trainer)
            )
        except Exception as error:
            # A training_step that cannot be run twice must not be what ends the run.
            log.warning(
                "the origin of incident %d was not found (%s: %s); training goes on",
                incident.id,
                type(error).__name__,
                error,
            )
            return None
        return origin
