"""Going on from a good checkpoint: what ended the run behind it, and whether all came back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.hooks import lower_learning_rate
from lit_stability.trainer_internals import (
    ReferenceStep,
    incomparable,
    replay_loss,
    same_batch,
    same_loss,
)
from lit_stability.training_state.good_checkpoints import FOLDER, RunEnd, State, put_aside

log = logging.getLogger("lightning.pytorch.lit_stability")

_MOST_FAILURES = 3
"""Failures in a row that make a resume more careful; a further one is told of and no more."""


class RestoredStateDiffers(RuntimeError):
    """Raised before the first step when a restored state gives another loss than the saved one."""


class PreviousRun:
    """What a fit resumes from, if it does, and the note it leaves for the next one.

    Args:
        trainer: of the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        path = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        self.source = path if path is not None and path.parent.name == FOLDER else None
        """The good checkpoint that the fit resumes from, or None."""
        end = None if self.source is None else RunEnd.read(self.source.parent)
        self._failures = 0 if end is None or path is None else end.failures_behind(path)
        self._told = False

    def lower_after_crash(self, after_crash: float) -> None:
        """Lower learning rate and clip if the run behind failed, and say so."""
        if not self._failures or after_crash == 1:
            return
        factor = after_crash ** min(self._failures, _MOST_FAILURES)
        lowered = lower_learning_rate(self._trainer, factor)
        done = (
            f"learning rate and clip x{factor:.3g} for a while"
            if lowered
            else "learning rate and clip stay as they are: only an AutoRollback can lower them"
        )
        again = "" if self._failures == 1 else f" {self._failures} times in a row"
        log.info("the run behind %s failed%s: %s", self.source, again, done)

    def clear(self, folder: Path) -> None:
        """Remove what a kill left half-written; move away the files of another run."""
        try:
            for part in folder.glob(".part-*"):
                part.unlink(missing_ok=True)
            isolated_step = put_aside(folder) if self._trainer.ckpt_path is None else None
            if isolated_step is not None:
                log.info(
                    "the good checkpoints of another run in this folder are in %s now",
                    isolated_step,
                )
        except OSError as error:
            self._tell(folder, error)

    def note(self, folder: Path, newest: Path | None, state: State, reason: str = "") -> None:
        """Write down how the fit stands, for the next one to `lower_after_crash`.

        Args:
            folder: of this fit's good checkpoints.
            newest: the last good checkpoint of this fit.
            state: running, or how it ended.
            reason: the exception, where there was one.
        """
        previous = newest or self.source
        end = RunEnd(
            state=state,
            step=self._trainer.global_step,
            reason=reason,
            checkpoint=None if previous is None else previous.name,
            failures=(self._failures if newest is None else 0) + (state == "failed"),
        )
        self._write(end, folder)
        if previous is not None and previous == self.source and folder != previous.parent:
            # As long as nothing is written here, the next resume looks where this one did.
            self._write(end, previous.parent)

    def _write(self, end: RunEnd, folder: Path) -> None:
        try:
            end.write(folder)
        except OSError as error:
            self._tell(folder, error)

    def _tell(self, folder: Path, error: OSError) -> None:
        if not self._told:
            log.warning("%s cannot be written (%s); training goes on", folder, error)
        self._told = True


class ResumeVerification:
    """Shows that a resumed fit is the one that was saved: first its state, then its data.

    Args:
        kept: the step that followed the copy, or None if none was kept.
        on_mismatch: what to do when the restored state gives another loss.
    """

    def __init__(
        self, kept: Mapping[str, Any] | None, on_mismatch: Literal["raise", "warn"]
    ) -> None:
        self._kept = kept
        self._on_mismatch = on_mismatch
        self._first = ReferenceStep(max_bytes=2**63)
        self._checked: float | None = None

    def before_first_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the loss of the kept batch with the one it had.

        Raises:
            RestoredStateDiffers: if they differ.
        """
        if self._kept is None:
            return
        reason = incomparable(trainer, self._kept)
        if reason is None:
            try:
                loss = replay_loss(trainer, pl_module, self._kept)
            except Exception as error:
                reason = f"training_step raised {error!r}"
        if reason is not None:
            log.warning("the restored state was not verified: %s", reason)
        elif same_loss(self._kept, loss):
            self._checked = loss
            self._first.begin(trainer, pl_module)
        else:
            self._refuse(loss)

    def _refuse(self, loss: float) -> None:
        assert self._kept is not None
        message = (
            "the restored state is not the one that was saved: the loss of the kept batch is "
            f"{loss:.9g}, it was {float(self._kept['loss']):.9g} at step {self._kept['step']}. "
            "The model or its options have changed, or the file is damaged; if the change is "
            "meant, resume with LastKnownGood(on_mismatch='warn')"
        )
        if self._on_mismatch == "raise":
            raise RestoredStateDiffers(message)
        log.warning("%s", message)

    def after_batch(self) -> None:
        """Tell, once, that the fit goes on where it stood, or that the data have changed."""
        checked, self._checked = self._checked, None
        if checked is None or self._kept is None:
            return
        head = f"resumed at step {self._kept['step']}: the kept batch has its loss of {checked:.6g}"
        now = self._first.kept
        if now is not None and same_batch(self._kept["batch"], now["batch"]):
            log.info("%s, and the data go on with the batch that came next", head)
        else:
            log.warning(
                "%s, but the data go on with another batch than the one that came next: data, "
                "their order or their augmentation have changed",
                head,
            )
        self.close()

    def close(self) -> None:
        """Leave the module as it was found, and let go of the batch."""
        self._first.cancel()
        self._kept = None
