"""Checks of a resume from a good checkpoint: how the previous run ended, and what is restored."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lit_stability.callbacks.hooks import lower_learning_rate
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.outside import guarded
from lit_stability.trainer_internals import (
    ReferenceStep,
    incomparable,
    local_path,
    replay_loss,
    same_batch,
    same_loss,
)
from lit_stability.training_state.good_checkpoints import (
    PART,
    RunEnd,
    State,
    good_checkpoint_of,
    put_aside,
)

log = suite_logger()

_MOST_FAILURES = 3
"""After this many failures in a row, further ones are reported but lower nothing more."""


class RestoredStateDiffers(RuntimeError):
    """Raised before the first step if the restored state gives another loss than the saved one."""


class PreviousRun:
    """The run that a fit resumes from, if any, and the record of this fit for the next resume.

    Args:
        trainer: of the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.source = good_checkpoint_of(local_path(trainer.ckpt_path))
        """The good checkpoint that the fit resumes from, or None."""
        end = None if self.source is None else RunEnd.read(self.source.parent)
        failures = 0 if end is None or self.source is None else end.failures_behind(self.source)
        # The ranks may see another state of a file that rank 0 rewrites.
        self._failures: int = trainer.strategy.broadcast(failures)

    def lower_after_crash(self, factor: float) -> None:
        """Lowers learning rate and clip if the previous run failed, and logs it."""
        if not self._failures or factor == 1:
            return
        factor = factor ** min(self._failures, _MOST_FAILURES)
        lowered = lower_learning_rate(self._trainer, factor)
        done = (
            f"learning rate and clip x{factor:.3g} for a while"
            if lowered
            else "learning rate and clip are unchanged: only an AutoRollback can lower them"
        )
        count = "" if self._failures == 1 else f" {self._failures} times in a row"
        log.info("the run that wrote %s failed%s: %s", self.source, count, done)

    def clear(self, folder: Path) -> None:
        """Removes partial files of a killed run; moves the files of another run away."""
        if self._trainer.is_global_zero:
            guarded(self, f"{folder} cannot be written", lambda: self._clear(folder))

    def _clear(self, folder: Path) -> None:
        for unfinished in folder.glob(f"step=*{PART}"):
            shutil.rmtree(unfinished)
        for part in folder.glob(".part-*"):
            part.unlink(missing_ok=True)
        moved_to = put_aside(folder) if self._trainer.ckpt_path is None else None
        if moved_to is not None:
            log.info("good checkpoints of another run in this folder were moved to %s", moved_to)

    def note(self, folder: Path, newest: Path | None, state: State, reason: str = "") -> None:
        """Writes the state of the fit to disk, for `lower_after_crash` of the next resume.

        Args:
            folder: the folder of this fit's good checkpoints.
            newest: the last good checkpoint of this fit, or None.
            state: running, or how the fit ended.
            reason: the exception, if there was one.
        """
        if not self._trainer.is_global_zero:
            return
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
            # Until this fit writes a checkpoint, the next resume reads the previous folder.
            self._write(end, previous.parent)

    def _write(self, end: RunEnd, folder: Path) -> None:
        guarded(self, f"{folder} cannot be written", lambda: end.write(folder))


class ResumeVerification:
    """Verifies that a resumed fit continues the saved one: first its state, then its data.

    On several ranks all run their kept step, or none does.

    Args:
        kept: the step that followed the copy, or None if none was kept.
        on_mismatch: what to do if the restored state gives another loss.
        gather: returns a value of every rank; all ranks call it, or none.
    """

    def __init__(
        self,
        kept: Mapping[str, Any] | None,
        on_mismatch: Literal["raise", "warn"],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self._kept, self._gather = kept, gather
        self._on_mismatch = on_mismatch
        self._first = ReferenceStep(max_bytes=2**63)
        self._checked: float | None = None

    def before_first_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the loss of the kept batch with the saved loss.

        Raises:
            RestoredStateDiffers: if they differ.
        """
        if not all(self._gather(self._kept is not None)):
            return
        assert self._kept is not None
        loss, reason = math.nan, self._first_of_ranks(incomparable(trainer, self._kept))
        if reason is None:
            try:
                loss = replay_loss(trainer, pl_module, self._kept)
            except Exception as error:
                reason = f"training_step raised {error!r}"
            reason = self._first_of_ranks(reason)
        if reason is not None:
            log.warning("the restored state was not verified: %s", reason)
            return
        differs = None if same_loss(self._kept, loss) else self._difference(loss)
        differs = self._first_of_ranks(differs)
        if differs is None:
            self._checked = loss
            self._first.begin(trainer, pl_module)
        elif self._on_mismatch == "raise":
            raise RestoredStateDiffers(differs)
        else:
            log.warning("%s", differs)

    def _first_of_ranks(self, text: str | None) -> str | None:
        return next((each for each in self._gather(text) if each is not None), None)

    def _difference(self, loss: float) -> str:
        assert self._kept is not None
        return (
            "the restored state differs from the saved state: the loss of the kept batch is "
            f"{loss:.9g}, it was {float(self._kept['loss']):.9g} at step {self._kept['step']}. "
            "The model or its options have changed, or the file is damaged; if the change is "
            "intended, resume with LastKnownGood(on_mismatch='warn')"
        )

    def after_batch(self) -> None:
        """Logs once that the fit continues exactly, or warns that the data have changed."""
        checked, self._checked = self._checked, None
        if checked is None or self._kept is None:
            return
        head = f"resumed at step {self._kept['step']}: the loss {checked:.6g} is as saved"
        first = self._first.kept
        if first is not None and same_batch(self._kept["batch"], first["batch"]):
            log.info("%s, and the data continue with the next batch", head)
        else:
            log.warning(
                "%s, but the next batch differs: the data, their order or augmentation changed",
                head,
            )
        self.close()

    def close(self) -> None:
        """Leaves the module as it was before the fit, and releases the batch."""
        self._first.cancel()
        self._kept = None
