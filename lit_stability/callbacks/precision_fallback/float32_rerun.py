"""Reruns a failing step in its own precision and in float32, to see if precision is the cause."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from lit_stability.callbacks.requirements import gather_of
from lit_stability.detectors import Spike
from lit_stability.diagnosis.nonfinite import NonFiniteOrigin
from lit_stability.incidents import Incident
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.trainer_internals import Outcome, apply_fp32_modules
from lit_stability.training_state.fp32_modules import release_from_fp32

Finding: TypeAlias = Literal["precision", "not precision", "not reproduced", "unknown"]


class Float32Rerun:
    """Reruns failing steps in isolation, and compares their own precision with float32.

    Precision is the cause if the step fails again in its own precision, is finite in float32, and
    has a gradient norm and a loss in float32 like those of earlier healthy steps. If it is a spike
    in float32, the batch is bad in any precision.
    """

    def __init__(self) -> None:
        self._healthy = (Spike("grad_norm"), Spike("loss"))

    def learn(self, stats: StepStats) -> None:
        """Learns gradient norm and loss of a healthy step."""
        for each in self._healthy:
            each.update(stats)

    def find(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> Finding:
        """Returns whether precision is the cause, the same on all ranks; adds evidence."""
        recorded_step, gather = incident.recorded_step, gather_of(trainer)
        if recorded_step is None or recorded_step.obstacle(trainer) is not None:
            return "unknown"
        try:
            own = recorded_step.rerun(trainer, pl_module, float32=False)
            wide = recorded_step.rerun(trainer, pl_module, float32=True)
            finding, evidence = self._judge(str(trainer.precision), own, wide, incident)
        except Exception as error:
            # A training_step that cannot be run twice must not end the run.
            finding, evidence = "unknown", f"the step cannot be run again: {error!r}"
        if evidence not in incident.evidence:
            incident.evidence.append(evidence)
        found: list[Finding] = gather(finding)
        incident.agree(True, gather)
        for worst in ("not precision", "precision"):
            if worst in found:
                return worst
        return finding

    def modules_to_keep_in_fp32(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident, most: int
    ) -> list[str]:
        """Keeps modules that overflow in float32, one by one, until the step is finite.

        The result is the same on all ranks.

        Args:
            trainer: the Trainer.
            pl_module: the module in training, with float32 weights.
            incident: an incident for which `find` returned "precision".
            most: how many modules may be kept in float32.

        Returns:
            Their names. If `most` modules are not enough, the list is empty and none is changed.
        """
        made: list[str] = []
        recorded_step, gather = incident.recorded_step, gather_of(trainer)
        if recorded_step is None or recorded_step.obstacle(trainer) is not None:
            return made
        while len(made) < most:
            origin = recorded_step.locate(trainer, pl_module, gather)
            blamed = _module_of(origin)
            names = sorted({n for n in gather(blamed) if n and n not in made})
            if not names:
                break
            if origin is not None and blamed in names:
                incident.evidence.append(origin.describe().splitlines()[0])
            incident.agree(True, gather)
            made += names
            apply_fp32_modules(trainer, names)
            own = recorded_step.rerun(trainer, pl_module, float32=False)
            if all(gather(own.finite or _is_for_the_scaler(own, incident))):
                return made
        for name in made:
            release_from_fp32(pl_module.get_submodule(name))
        return []

    def _judge(
        self, precision: str, own: Outcome, wide: Outcome, incident: Incident
    ) -> tuple[Finding, str]:
        if own.finite:
            return "not reproduced", f"run again in {precision} in isolation, the step is finite"
        seen = (
            f"run again in {precision}, the step fails (loss {own.loss:.4g}, gradient norm "
            f"{own.grad_norm:.4g}), in float32 "
        )
        if not wide.finite:
            return "not precision", f"{seen}too"
        seen += f"it has loss {wide.loss:.4g}, gradient norm {wide.grad_norm:.4g}"
        stats = StepStats(step=incident.anomaly.step, loss=wide.loss, grad_norm=wide.grad_norm)
        unusual = [a.message for each in self._healthy if (a := each.check(stats)) is not None]
        if unusual:
            return "not precision", f"{seen}: {unusual[0]}"
        return "precision", f"{seen}, which is normal"

    def state_dict(self) -> dict[str, Any]:
        """Returns the statistics of healthy steps."""
        return {spike.signal: spike.state_dict() for spike in self._healthy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the statistics of healthy steps."""
        for spike in self._healthy:
            spike.load_state_dict(state[spike.signal])


def _module_of(origin: NonFiniteOrigin | None) -> str:
    """Returns the module that overflows; "" if none does, or if it is the root module itself."""
    return origin.module if origin is not None and origin.overflow else ""


def _is_for_the_scaler(outcome: Outcome, incident: Incident) -> bool:
    """Whether only gradients still overflow, and the loss scaler is still searching for a scale."""
    scaled = incident.stats is not None and incident.stats.loss_scale is not None
    searching = not incident.anomaly.kind.startswith("loss-scale")
    return scaled and searching and math.isfinite(outcome.loss)
