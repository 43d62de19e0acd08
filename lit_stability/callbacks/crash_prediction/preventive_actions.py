"""What `CrashPrediction` does to a trainer: saves a checkpoint, widens the precision, stops it.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.hooks import call_hook
from lit_stability.callbacks.precision_fallback import PrecisionFallback
from lit_stability.detectors import Anomaly
from lit_stability.incidents import Incident, TrainingStopped
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
from lit_stability.training_state.good_checkpoints import free_path, good_files, step_of
from lit_stability.training_state.host_copy import first_nonfinite, is_finite

FOLDER = "risk"
"""Name of the folder, in the run's own, for checkpoints of a run in danger."""
_WIDE = "32-true"


class PreventiveActions:
    """Carries out, on one trainer, what a risk asks for; after a batch that an update came with.

    Args:
        trainer: at the start of its training, in its own precision.
        keep: checkpoints kept, the newest.
    """

    def __init__(self, trainer: Trainer, keep: int) -> None:
        self._trainer, self._keep = trainer, keep
        self._home = str(trainer.precision)
        self._switch = PrecisionSwitch(trainer)
        buffers = trainer.lightning_module.named_buffers()
        self._constants = [name for name, buffer in buffers if not is_finite(buffer)]
        """Buffers that hold such values on purpose, as a mask of -inf does."""
        self._told = False
        """Whether it was said why the precision stays."""

    def save(self) -> str:
        """Save the state after the step that was just taken; on all ranks or none.

        Returns:
            What came of it, in words: a disk that is full ends no run.
        """
        if sharing(self._trainer) == "shards":
            return "no checkpoint, as the weights are sharded: ModelCheckpoint saves those"
        state, directory = full_checkpoint(self._trainer), run_directory(self._trainer)
        if directory is None or not self._trainer.is_global_zero:
            return "no checkpoint"
        try:
            bad = first_nonfinite(state, self._constants)
            if bad is not None:
                return f"no checkpoint, as {bad} is non-finite"
            path = self._write(state, directory / FOLDER)
        except Exception as error:
            # A full disk, an object that does not pickle: never what ends the run.
            return f"no checkpoint ({error})"
        return f"saved {path}"

    def _write(self, state: dict[str, Any], folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = free_path(folder, self._trainer.global_step)
        write_whole(state, path)
        older = [f for f in good_files(folder) if step_of(f) <= self._trainer.global_step]
        for file in older[: -self._keep]:
            file.unlink(missing_ok=True)
        return path

    def widen(self, pl_module: LightningModule) -> str:
        """Compute in float32 from the next step on; returns that, or why not, or nothing."""
        if self._home == _WIDE:
            return ""
        reason = self._why_not()
        if reason is None:
            self._put(pl_module, _WIDE)
            return f"precision {self._home} -> {_WIDE}"
        told, self._told = self._told, True
        return "" if told else f"precision stays {self._home}: {reason}"

    def narrow(self, pl_module: LightningModule) -> str:
        """Go back to the trainer's own precision, if another was put in force here."""
        if self._home == _WIDE or self._why_not() or str(self._trainer.precision) != _WIDE:
            return ""
        self._put(pl_module, self._home)
        return f"precision {_WIDE} -> {self._home}"

    def _put(self, pl_module: LightningModule, precision: str) -> None:
        self._switch.put(precision)
        call_hook("on_precision_changed", self._trainer, pl_module)

    def _why_not(self) -> str | None:
        if not self._home.endswith("-mixed"):
            return "weights that are not float32 would become so for good"
        if any(isinstance(c, PrecisionFallback) for c in callbacks_of(self._trainer)):
            return "PrecisionFallback changes it, where it finds that it is the cause"
        return why_fixed(self._trainer)

    def leave(self) -> None:
        """Give the trainer its own precision back, at the end of a fit."""
        if str(self._trainer.precision) == _WIDE != self._home:
            self._switch.put(self._home)

    def scalers(self) -> dict[str, dict[str, Any]]:
        """States of the loss scalers, by precision, of the one put aside too."""
        return self._switch.scalers()

    def load_scalers(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Put them back."""
        self._switch.load_scalers(dict(states))


def stopped(trainer: Trainer, risk: CrashRisk, step: int, saved: str) -> TrainingStopped:
    """The exception that ends a fit which is about to diverge.

    Args:
        trainer: of the fit.
        risk: that reached the level for it.
        step: after which it did.
        saved: what became of the last checkpoint, in words.
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
        f"{incident.remedy}. Weights are those of the last step; {saved or 'nothing was saved'}",
        incident,
    )
