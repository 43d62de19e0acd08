"""The actions of `CrashPrediction`: save a checkpoint, switch to float32, stop the training.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_stability.callbacks.hooks import call_hook
from lit_stability.detectors import Anomaly
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.outside import tried
from lit_stability.policies.crash_risk import CrashRisk
from lit_stability.trainer_internals import (
    PrecisionSwitch,
    callbacks_of,
    full_checkpoint,
    run_directory,
    sharing,
    why_fixed,
)
from lit_stability.training_state.async_writer import write_whole
from lit_stability.training_state.good_checkpoints import free_path, prune
from lit_stability.training_state.host_copy import first_nonfinite, is_finite

FOLDER = "risk"
"""Name of the folder, in the run's folder, for checkpoints of a run in danger."""
_FLOAT32 = "32-true"


class PreventiveActions:
    """Carries out preventive actions on one trainer, after a batch with an optimizer step.

    Args:
        trainer: at the start of its training, in its own precision.
        keep: number of checkpoints kept; the oldest are deleted.
    """

    def __init__(self, trainer: Trainer, keep: int) -> None:
        self._trainer, self._keep = trainer, keep
        self._configured = str(trainer.precision)
        self._switch = PrecisionSwitch(trainer)
        buffers = trainer.lightning_module.named_buffers()
        self._nonfinite_buffers = [name for name, buffer in buffers if not is_finite(buffer)]
        """Buffers that are non-finite on purpose, such as a mask of -inf."""
        self._reason_logged = False
        """Whether the reason for which the precision cannot change was logged."""

    def save(self) -> str:
        """Saves the state after the last step; to be called on all ranks or none.

        Returns:
            The result, in words. A failure such as a full disk does not end the run.
        """
        if sharing(self._trainer) == "shards":
            return "no checkpoint saved (the weights are sharded: use ModelCheckpoint)"
        state, directory = full_checkpoint(self._trainer), run_directory(self._trainer)
        if directory is None or not self._trainer.is_global_zero:
            return "no checkpoint saved"
        bad = first_nonfinite(state, self._nonfinite_buffers)
        if bad is not None:
            return f"no checkpoint saved ({bad} is non-finite)"
        # A full disk or an object that cannot be pickled must never end the run.
        path, error = tried(lambda: self._write(state, directory / FOLDER))
        return f"saved {path}" if error is None else f"no checkpoint saved ({error})"

    def _write(self, state: dict[str, Any], folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = free_path(folder, self._trainer.global_step)
        write_whole(state, path)
        prune(folder, self._trainer.global_step, self._keep)
        return path

    def widen(self, pl_module: LightningModule) -> str:
        """Switches to float32 from the next step on.

        Returns:
            The change, or the reason against it (once only); empty if there is nothing to report.
        """
        if self._configured == _FLOAT32:
            return ""
        reason = self._obstacle()
        if reason is None:
            self._switch_to(pl_module, _FLOAT32)
            return f"precision {self._configured} -> {_FLOAT32}"
        logged, self._reason_logged = self._reason_logged, True
        return "" if logged else f"precision stays {self._configured}: {reason}"

    def narrow(self, pl_module: LightningModule) -> str:
        """Switches back to the configured precision, if `widen` has changed it; returns that."""
        if (
            self._configured == _FLOAT32
            or self._obstacle()
            or str(self._trainer.precision) != _FLOAT32
        ):
            return ""
        self._switch_to(pl_module, self._configured)
        return f"precision {_FLOAT32} -> {self._configured}"

    def _switch_to(self, pl_module: LightningModule, precision: str) -> None:
        self._switch.put(precision)
        call_hook("on_precision_changed", self._trainer, pl_module)

    def _obstacle(self) -> str | None:
        if not self._configured.endswith("-mixed"):
            return "the change of half-precision weights to float32 would be permanent"
        for callback in callbacks_of(self._trainer):
            if getattr(callback, "changes_precision", False):
                return f"{type(callback).__name__} changes it if precision is the cause"
        return why_fixed(self._trainer)

    def close(self) -> None:
        """Restores the configured precision at the end of a fit."""
        if str(self._trainer.precision) == _FLOAT32 != self._configured:
            self._switch.put(self._configured)

    def scalers(self) -> dict[str, dict[str, Any]]:
        """Returns the states of the loss scalers by precision, including the inactive one."""
        return self._switch.scalers()

    def load_scalers(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Restores the states of the loss scalers."""
        self._switch.load_scalers(dict(states))


def training_stopped(trainer: Trainer, risk: CrashRisk, step: int, saved: str) -> TrainingStopped:
    """Returns the exception that ends a fit before it diverges.

    Args:
        trainer: of the fit.
        risk: the risk that reached the level ``stop``.
        step: the step after which it did.
        saved: the result of the last `PreventiveActions.save`, or empty.
    """
    anomaly = Anomaly(
        kind="divergence",
        step=step,
        value=risk.value,
        signal="risk",
        message=risk.in_words(),
    )
    incident = Incident(0, anomaly, epoch=trainer.current_epoch)
    return TrainingStopped(
        f"training stopped at step {trainer.global_step}: {risk.in_words()}. What to try: "
        f"{incident.remedy}. Weights are those of the last step; {saved or 'no checkpoint saved'}",
        incident,
    )
