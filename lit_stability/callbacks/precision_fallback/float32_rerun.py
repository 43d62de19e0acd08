"""Whether a step failed for want of precision: taken again, in its own precision and in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.requirements import gather_of
from lit_stability.detectors import Spike
from lit_stability.diagnosis.nonfinite import NonFiniteOrigin
from lit_stability.incidents import Incident
from lit_stability.measurement.step_stats import StepStats
from lit_stability.trainer_internals import Outcome, apply_fp32_modules
from lit_stability.training_state.fp32_modules import release_from_fp32

Finding: TypeAlias = Literal["precision", "not precision", "not reproduced", "unknown"]


class Float32Rerun:
    """Takes failing steps again beside training, and judges by what float32 makes of them.

    Precision is to blame if the step fails again in its own precision, is finite in float32, and
    has there a gradient norm and a loss like those of healthy steps before it. A batch of which
    float32 makes a spike is bad data whatever the precision.
    """

    def __init__(self) -> None:
        self._usual = (Spike("grad_norm"), Spike("loss"))

    def learn(self, stats: StepStats) -> None:
        """Take up what a healthy step looks like."""
        for each in self._usual:
            each.update(stats)

    def find(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> Finding:
        """Judge the step of an incident, on all ranks alike; its evidence goes to the incident."""
        recorded_step, gather = incident.recorded_step, gather_of(trainer)
        if recorded_step.obstacle(trainer) is not None:
            return "unknown"
        try:
            own = recorded_step.rerun(trainer, pl_module, float32=False)
            wide = recorded_step.rerun(trainer, pl_module, float32=True)
            finding, words = self._judge(str(trainer.precision), own, wide, incident)
        except Exception as error:
            # A training_step that cannot be run twice must not be what ends the run.
            finding, words = "unknown", f"the step cannot be taken again: {error!r}"
        if words not in incident.evidence:
            incident.evidence.append(words)
        found: list[Finding] = gather(finding)
        incident.agree(True, gather)
        for worst in ("not precision", "precision"):
            if worst in found:
                return worst
        return finding

    def modules_to_keep_in_fp32(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident, most: int
    ) -> list[str]:
        """Make islands of the modules that overflow, until the step is finite, on all ranks alike.

        Args:
            trainer: at the incident.
            pl_module: in training, with float32 weights.
            incident: that `find` has blamed on precision.
            most: islands that may be made.

        Returns:
            Their names; nothing, and no island made, where that many are not enough.
        """
        made: list[str] = []
        recorded_step, gather = incident.recorded_step, gather_of(trainer)
        if recorded_step.obstacle(trainer) is not None:
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
            return "not reproduced", f"taken again in {precision} beside training, it is finite"
        seen = (
            f"taken again in {precision} it fails (loss {own.loss:.4g}, gradient norm "
            f"{own.grad_norm:.4g}), in float32 "
        )
        if not wide.finite:
            return "not precision", f"{seen}too"
        seen += f"it is loss {wide.loss:.4g}, gradient norm {wide.grad_norm:.4g}"
        stats = StepStats(step=incident.anomaly.step, loss=wide.loss, grad_norm=wide.grad_norm)
        unusual = [a.message for each in self._usual if (a := each.check(stats)) is not None]
        if unusual:
            return "not precision", f"{seen}: {unusual[0]}"
        return "precision", f"{seen}, as is usual"

    def state_dict(self) -> dict[str, Any]:
        """What healthy steps look like."""
        return {each.signal: each.state_dict() for each in self._usual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        for each in self._usual:
            each.load_state_dict(state[each.signal])


def _module_of(origin: NonFiniteOrigin | None) -> str:
    """The module that overflows, or "" where none does, or where it is the model's own code."""
    return origin.module if origin is not None and origin.overflow else ""


def _is_for_the_scaler(outcome: Outcome, incident: Incident) -> bool:
    """Whether nothing overflows any more but gradients whose scale is still being searched for."""
    scaled = incident.stats is not None and incident.stats.loss_scale is not None
    searching = not incident.anomaly.kind.startswith("loss-scale")
    return scaled and searching and math.isfinite(outcome.loss)
