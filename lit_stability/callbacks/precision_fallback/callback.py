"""`PrecisionFallback`: another precision where numbers overflow, and the faster one again later."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_stability.callbacks.hooks import StabilityCallback, call_hook
from lit_stability.callbacks.precision_fallback.float32_rerun import Float32Rerun
from lit_stability.callbacks.requirements import require_monitor, require_supported_strategy
from lit_stability.detectors import Anomaly
from lit_stability.incidents import Incident
from lit_stability.measurement.lost_updates import lost_epsilon
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import KeepInFloat32, LowerPrecision
from lit_stability.policies.precision import PRECISIONS, PrecisionPolicy, is_below, lower_precisions
from lit_stability.trainer_internals import (
    PrecisionSwitch,
    apply_fp32_modules,
    ends_window,
    is_supported,
    remove_gradients,
    why_fixed,
)
from lit_stability.training_state.fp32_modules import matching

log = logging.getLogger("lightning.pytorch.lit_stability")

_FAILED = ("non-finite loss", "non-finite gradient", "loss-scale collapse", "loss-scale fall")
"""Kinds of anomaly for which the step is taken again in float32."""
_CAUSES = {
    "infinite loss": "loss computed in 16 bits",
    "lost updates": "updates lost to rounding",
}
"""Rows of `lit_stability.diagnosis`, by kind of anomaly; of all others it is "numeric
precision"."""


class PrecisionFallback(StabilityCallback):
    """Changes to a precision that holds more numbers when, and only when, precision is the cause.

    That is proven first: a failing step is taken again beside training, in its own precision and
    in float32. If float32 makes an ordinary step of it, the model goes down a rung, such as from
    16-mixed to bf16-mixed, and the step is taken anew by the `AutoRollback` that follows in the
    list; without one, that step is lost. A batch that is bad in float32 too is left to others, and
    so is the scaler's search for a scale. After ``try_again_after`` healthy steps the faster
    precision is tried again; each failure doubles that wait, and after ``failures`` of them it
    stays down. What is in force is saved in checkpoints and holds on resume, and beyond the fit.

    Weights in half precision (``16-true``, ``bf16-true``) become float32 for good, with the
    optimizer state: when the proof says so; when rounding swallows most updates; and before the
    first step if Adam's ``eps`` is 0 in their format, which makes 0 / 0 of the first update.

    Args:
        precisions: those to go down to, in order, by Lightning's names; None for bf16-mixed and
            32-true. Those that are not below the trainer's precision, or that the device lacks,
            are left out.
        fp32_modules: modules that compute in float32 from the start while the rest is in 16 bits:
            names, globs or class names, or classes; see
            `lit_stability.training_state.fp32_modules`.
        try_again_after: healthy steps.
        failures: tries of the faster precision that may fail.
        max_fp32_modules: modules that may be made float32 islands in the course of a run before the
            whole model goes down a rung; 0 for never.
        infinite_losses: strikes of an infinite loss with finite gradients before it is acted upon;
            training goes on meanwhile.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        precisions: Sequence[str] | None = None,
        fp32_modules: Sequence[str | type[nn.Module]] = (),
        try_again_after: int = 500,
        failures: int = 3,
        max_fp32_modules: int = 3,
        infinite_losses: int = 3,
    ) -> None:
        for name, value, least in (
            ("max_fp32_modules", max_fp32_modules, 0),
            ("try_again_after", try_again_after, 1),
            ("failures", failures, 0),
            ("infinite_losses", infinite_losses, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        for precision in precisions or ():
            if precision not in PRECISIONS or precision in ("16-true", "bf16-true"):
                raise ValueError(
                    "precisions must be of '16-mixed', 'bf16-mixed' and '32-true', got "
                    f"{precision!r}"
                )
        if isinstance(fp32_modules, str):
            raise ValueError(f"fp32_modules must be a list, got {fp32_modules!r}")
        self.precisions = None if precisions is None else tuple(precisions)
        self.fp32_modules = tuple(fp32_modules)
        self.try_again_after = try_again_after
        self.failures = failures
        self.max_fp32_modules = max_fp32_modules
        self.infinite_losses = infinite_losses
        self.kept_in_fp32: list[str] = []
        """Modules that compute in float32."""
        self._policy: PrecisionPolicy | None = None
        self._switch: PrecisionSwitch | None = None
        self._float32_rerun = Float32Rerun()
        self._restored: Mapping[str, Any] = {}
        self._scalers: dict[str, dict[str, Any]] = {}
        self._made = 0
        self._due: str | None = None
        self._counted = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the rungs, and refuse what cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it, or if ``fp32_modules`` match nothing.
            RuntimeError: under a strategy that was not tried.
        """
        if stage != "fit":
            return
        require_monitor(trainer, self)
        require_supported_strategy(trainer, self)
        if self._switch is None or self._switch.trainer is not trainer:
            self._switch = PrecisionSwitch(trainer)
        precision, policy = str(trainer.precision), self._policy
        if policy is None or precision not in (policy.home, policy.current):
            self._policy = PrecisionPolicy(
                precision,
                self._precisions_below(trainer),
                wait=self.try_again_after,
                failures=self.failures,
            )
        self._restore()

    def _precisions_below(self, trainer: Trainer) -> list[str]:
        home = str(trainer.precision)
        reason = why_fixed(trainer) if "16" in home else None
        if reason is not None:
            log.info("PrecisionFallback changes nothing: %s", reason)
        if reason is not None or home not in PRECISIONS:
            return []
        precisions = lower_precisions(home) if self.precisions is None else self.precisions
        return [r for r in precisions if is_below(r, home) and is_supported(trainer, r)]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the precision in force before the module is made to fit the one configured."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and trainer.state.fn == "fit":
            self.load_state_dict(state)
            self._now.before_setup(self._active_policy.current, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put precision and islands in force, and look at the optimizers' epsilons."""
        self._due = None
        self._now.load_scalers(self._scalers)
        self._scalers = {}
        if "16" in self._active_policy.home:
            chosen = matching(pl_module, self.fp32_modules)
            self.kept_in_fp32 = list(dict.fromkeys([*chosen, *self.kept_in_fp32]))
        self._put(trainer, pl_module, self._active_policy.current)
        lost = lost_epsilon(trainer.optimizers)
        if lost is None:
            return
        if self._active_policy.next is None:
            log.warning("%s: raise it to 1e-4", lost)
            return
        was, precision = self._active_policy.current, self._active_policy.down()
        log.info("%s: precision %s -> %s before the first step", lost, was, precision)
        self._put(trainer, pl_module, precision)

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Count the calm, and learn what a healthy step looks like."""
        if self._active_policy.next is not None:
            self._float32_rerun.learn(stats)
        if stats.step == self._counted:
            return
        self._counted = stats.step
        was, precision = self._active_policy.current, self._active_policy.healthy()
        if precision is not None:
            self._due = precision
            log.info("step %d: calm, precision %s -> %s again", stats.step, was, precision)

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Take no step that is not finite, until all ranks have voted."""
        if self._active_policy.next is not None and anomaly.kind in _FAILED:
            remove_gradients(trainer.optimizers[anomaly.optimizer])

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Go down a rung if precision is the cause; the step is for others to take again."""
        self._active_policy.disturbed()
        self._due = None
        if incident.resolved or self._active_policy.next is None:
            return
        if not self._is_cause(trainer, pl_module, incident):
            return
        cause = _CAUSES.get(incident.anomaly.kind, "numeric precision")
        incident.shown.setdefault(cause, "a wider format makes an ordinary step of it")
        if not self._keep_modules_in_fp32(trainer, pl_module, incident):
            was = self._active_policy.current
            self._due = self._active_policy.down()
            incident.adjust(LowerPrecision(was, self._due))
        if not incident.anomaly.warn_only:
            remove_gradients(trainer.optimizers[incident.anomaly.optimizer])

    def _is_cause(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> bool:
        kind = incident.anomaly.kind
        if kind == "lost updates":
            return self._active_policy.current.endswith("-true")
        if kind == "infinite loss":
            if incident.occurrences < self.infinite_losses:
                return False
        elif kind not in _FAILED:
            return False
        finding = self._float32_rerun.find(trainer, pl_module, incident)
        if finding == "precision":
            incident.verdict = "deterministic"
        return finding == "precision" or (
            # What cannot be taken again: the scaler's own verdict has to do.
            finding == "unknown" and kind == "loss-scale collapse"
        )

    def _keep_modules_in_fp32(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> bool:
        """Whether islands of the modules that overflow are enough; they are in force then."""
        left = self.max_fp32_modules - self._made
        if (
            left < 1
            or incident.anomaly.kind not in _FAILED
            or "true" in self._active_policy.current
        ):
            return False
        names = self._float32_rerun.modules_to_keep_in_fp32(trainer, pl_module, incident, left)
        self._made += len(names)
        self.kept_in_fp32 += names
        for name in names:
            incident.adjust(KeepInFloat32(name))
        return bool(names)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Change the precision, between two optimizer steps."""
        if self._due is not None and ends_window(trainer):
            self._put(trainer, pl_module, self._due)
            self._due = None

    def _put(self, trainer: Trainer, pl_module: LightningModule, precision: str) -> None:
        if str(trainer.precision) != precision:
            self._now.put(precision)
            call_hook("on_precision_changed", trainer, pl_module)
        if precision != "32-true":
            apply_fp32_modules(trainer, self.kept_in_fp32)

    @property
    def needs_recorded_step(self) -> bool:
        """Whether steps are to be kept for it: not where there is no precision to fall back to."""
        return self._policy is not None and self._policy.has_lower_precision

    @property
    def _active_policy(self) -> PrecisionPolicy:
        assert self._policy is not None, "after setup only"
        return self._policy

    @property
    def _now(self) -> PrecisionSwitch:
        assert self._switch is not None, "after setup only"
        return self._switch

    def state_dict(self) -> dict[str, Any]:
        """The precision in force and what it has cost, islands, and scalers put aside."""
        if self._policy is None or self._switch is None:
            return {}
        return {
            "ladder": self._policy.state_dict(),
            "islands": list(self.kept_in_fp32),
            "made": self._made,
            "scalers": self._switch.scalers(),
            "proof": self._float32_rerun.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put such a state back; it is in force from the start of training."""
        self._restored = state_dict
        if self._policy is not None:
            self._restore()

    def _restore(self) -> None:
        state, self._restored = self._restored, {}
        if not state or not self._active_policy.load_state_dict(state["ladder"]):
            return
        self.kept_in_fp32, self._made = list(state["islands"]), int(state["made"])
        self._scalers = dict(state["scalers"])
        self._float32_rerun.load_state_dict(state["proof"])
