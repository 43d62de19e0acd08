"""`PrecisionFallback`: changes the precision if it makes steps fail, and tries it again later."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lit_stability.callbacks.hooks import StabilityCallback, call_hook
from lit_stability.callbacks.precision_fallback.float32_rerun import Float32Rerun
from lit_stability.callbacks.requirements import require_monitor, require_supported_strategy
from lit_stability.detectors import Anomaly
from lit_stability.incidents import Incident
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
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

log = suite_logger()

_RERUN_KINDS = ("non-finite loss", "non-finite gradient", "loss-scale collapse", "loss-scale fall")
"""Kinds of anomaly for which the step is run again in float32."""
_CAUSES = {
    "infinite loss": "loss computed in 16 bits",
    "lost updates": "updates lost to rounding",
}
"""Names of causes in `lit_stability.diagnosis` by kind of anomaly; default "numeric precision"."""


class PrecisionFallback(StabilityCallback):
    """Switches to a wider numeric format if, and only if, precision is the cause of an incident.

    The callback verifies this first: it runs the failing step again in isolation, in its own
    precision and in float32. If the step is normal in float32, the callback switches to the next
    precision level, such as from 16-mixed to bf16-mixed. The `AutoRollback` after it in the list
    then retries the step; without one, the step is lost. A batch that also fails in float32 is left
    to other callbacks, and so is the loss scaler's search for a scale. After ``try_again_after``
    healthy steps the callback tries the faster precision again. Each failure doubles that wait, and
    after ``failures`` of them the change is permanent. Checkpoints save the precision in force; it
    is kept on resume, and after the fit.

    Weights in half precision (``16-true``, ``bf16-true``) become float32 permanently, with the
    optimizer state, in three cases: if the rerun shows that precision is the cause; if rounding
    cancels most updates; and before the first step if Adam's ``eps`` is 0 in their format, so that
    the first update is 0 / 0.

    >>> from lit_stability import stability_callbacks
    >>> suite = stability_callbacks(precision=dict(fp32_modules=["decoder.head"]))

    Args:
        precisions: precision levels to switch to, in order, by Lightning's names; None for
            bf16-mixed and 32-true. Levels that are not below the trainer's precision, or that the
            device does not support, are skipped.
        fp32_modules: modules that compute in float32 from the start while the rest is in 16 bits:
            names, globs or class names, or classes; see
            `lit_stability.training_state.fp32_modules`.
        try_again_after: healthy steps before the faster precision is tried again.
        failures: how often the faster precision may fail when it is tried again.
        max_fp32_modules: modules that may be kept in float32 during a run before the whole model
            switches to the next level; 0 for none.
        infinite_losses: occurrences of an infinite loss with finite gradients before the callback
            acts; training continues meanwhile.

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
                    "precisions accepts '16-mixed', 'bf16-mixed' and '32-true' only, got "
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
        self._modules_added = 0
        self._pending_precision: str | None = None
        self._counted_step = -1

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_switch": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses the precision levels, and refuses a fit in which this callback cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it, or if ``fp32_modules`` match nothing.
            RuntimeError: under a strategy that is not supported.
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
        """Applies the saved precision before Lightning sets up the module in the configured one."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        in_force = self._policy is not None and trainer.state.fn == "fit"
        if state is not None and in_force:
            self.load_state_dict(state)
            self._active_switch.before_setup(self._active_policy.current, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies precision and modules kept in fp32, and checks the optimizers' epsilons."""
        self._pending_precision = None
        if self._policy is None:
            return
        self._active_switch.load_scalers(self._scalers)
        self._scalers = {}
        if "16" in self._active_policy.home:
            chosen = matching(pl_module, self.fp32_modules)
            self.kept_in_fp32 = list(dict.fromkeys([*chosen, *self.kept_in_fp32]))
        self._set_precision(trainer, pl_module, self._active_policy.current)
        lost = lost_epsilon(trainer.optimizers)
        if lost is None:
            return
        if self._active_policy.next is None:
            log.warning("%s: raise it to 1e-4", lost)
            return
        previous, precision = self._active_policy.current, self._active_policy.down()
        log.info("%s: precision %s -> %s before the first step", lost, previous, precision)
        self._set_precision(trainer, pl_module, precision)

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Counts the step; after enough of them, schedules a try of the faster precision."""
        if self._policy is None:
            return
        if self._active_policy.next is not None:
            self._float32_rerun.learn(stats)
        if stats.step == self._counted_step:
            return
        self._counted_step = stats.step
        previous, precision = self._active_policy.current, self._active_policy.healthy()
        if precision is not None:
            self._pending_precision = precision
            log.info(
                "step %d: healthy steps, precision %s -> %s is tried again",
                stats.step,
                previous,
                precision,
            )

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Skips a non-finite step; the response is chosen when all ranks have voted."""
        if self._policy is None or self._policy.next is None:
            return
        if anomaly.kind in _RERUN_KINDS:
            remove_gradients(trainer.optimizers[anomaly.optimizer])

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Switches to the next level if precision is the cause; does not retry the step itself."""
        if self._policy is None:
            return
        self._active_policy.disturbed()
        self._pending_precision = None
        if incident.resolved or self._active_policy.next is None:
            return
        if not self._is_cause(trainer, pl_module, incident):
            return
        cause = _CAUSES.get(incident.anomaly.kind, "numeric precision")
        incident.shown.setdefault(cause, "the step is normal in a wider format")
        if not self._keep_modules_in_fp32(trainer, pl_module, incident):
            previous = self._active_policy.current
            self._pending_precision = self._active_policy.down()
            incident.adjust(LowerPrecision(previous, self._pending_precision))
        if not incident.anomaly.warn_only:
            remove_gradients(trainer.optimizers[incident.anomaly.optimizer])

    def _is_cause(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> bool:
        kind = incident.anomaly.kind
        if kind == "lost updates":
            return self._active_policy.current.endswith("-true")
        if kind == "infinite loss":
            if incident.occurrences < self.infinite_losses:
                return False
        elif kind not in _RERUN_KINDS:
            return False
        finding = self._float32_rerun.find(trainer, pl_module, incident)
        if finding == "precision":
            incident.verdict = "deterministic"
        return finding == "precision" or (
            # The step cannot be run again: trust the loss scaler, which found no scale.
            finding == "unknown" and kind == "loss-scale collapse"
        )

    def _keep_modules_in_fp32(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> bool:
        """Keeps the modules that overflow in fp32; returns whether that is enough."""
        allowed = self.max_fp32_modules - self._modules_added
        if (
            allowed < 1
            or incident.anomaly.kind not in _RERUN_KINDS
            or "true" in self._active_policy.current
        ):
            return False
        names = self._float32_rerun.modules_to_keep_in_fp32(trainer, pl_module, incident, allowed)
        self._modules_added += len(names)
        self.kept_in_fp32 += names
        for name in names:
            incident.adjust(KeepInFloat32(name))
        return bool(names)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Applies a due change of precision, between two optimizer steps."""
        if self._pending_precision is not None and ends_window(trainer):
            self._set_precision(trainer, pl_module, self._pending_precision)
            self._pending_precision = None

    def _set_precision(self, trainer: Trainer, pl_module: LightningModule, precision: str) -> None:
        if str(trainer.precision) != precision:
            self._active_switch.put(precision)
            call_hook("on_precision_changed", trainer, pl_module)
        if precision != "32-true":
            apply_fp32_modules(trainer, self.kept_in_fp32)

    @property
    def changes_precision(self) -> bool:
        """Returns True: where precision is the cause, this callback changes it."""
        return True

    @property
    def needs_recorded_step(self) -> bool:
        """Returns whether steps are recorded for a rerun: only if there is a level to switch to."""
        return self._policy is not None and self._policy.has_lower_precision

    @property
    def _active_policy(self) -> PrecisionPolicy:
        assert self._policy is not None, "after setup only"
        return self._policy

    @property
    def _active_switch(self) -> PrecisionSwitch:
        assert self._switch is not None, "after setup only"
        return self._switch

    def state_dict(self) -> dict[str, Any]:
        """Returns precision level and failures, modules kept in fp32, and inactive loss scalers."""
        if self._policy is None or self._switch is None:
            return {}
        return {
            "ladder": self._policy.state_dict(),
            "islands": list(self.kept_in_fp32),
            "made": self._modules_added,
            "scalers": self._switch.scalers(),
            "proof": self._float32_rerun.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state; it is in force from the start of training."""
        self._restored = state_dict
        if self._policy is not None:
            self._restore()

    def _restore(self) -> None:
        state, self._restored = self._restored, {}
        if not state or not self._active_policy.load_state_dict(state["ladder"]):
            return
        self.kept_in_fp32, self._modules_added = list(state["islands"]), int(state["made"])
        self._scalers = dict(state["scalers"])
        self._float32_rerun.load_state_dict(state["proof"])
