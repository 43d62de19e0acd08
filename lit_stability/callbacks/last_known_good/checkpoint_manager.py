"""Takes copies of the state, has healthy steps confirm them, and hands them to the writer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.trainer_internals import ReferenceStep, ends_window
from lit_stability.training_state.async_writer import AsyncCheckpointWriter
from lit_stability.training_state.host_copy import HostCopy, is_finite

log = logging.getLogger("lightning.pytorch.lit_stability")


class CheckpointManager:
    """One copy of the state at a time: due, taken, on probation, being written.

    Args:
        trainer: of the fit.
        pl_module: in training.
        writer: of confirmed copies.
        every_n_steps: optimizer steps between copies.
        confirm_after: healthy steps after which a copy is good.
        max_batch_bytes: of the batch that is kept with a copy.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        writer: AsyncCheckpointWriter,
        *,
        every_n_steps: int,
        confirm_after: int,
        max_batch_bytes: int,
    ) -> None:
        self.writer = writer
        self.last: int | None = None
        """Step of the newest confirmed copy, or of the checkpoint that the fit resumed from."""
        self._trainer, self._module = trainer, pl_module
        self._every_n_steps, self._confirm_after = every_n_steps, confirm_after
        self._constants = [n for n, b in pl_module.named_buffers() if not is_finite(b)]
        self._copy = HostCopy()
        self._reference = ReferenceStep(max_batch_bytes)
        self._calm = True
        self._age: int | None = None
        self._step = 0
        self._told: set[str] = set()

    def between_batches(self, checkpoint: Callable[[], dict[str, Any]]) -> None:
        """Take a copy if one is due.

        Args:
            checkpoint: makes the checkpoint that is copied.
        """
        if not self._due():
            return
        try:
            self._copy.capture(checkpoint())
        except Exception as error:
            # A hook of the user's that raises, an object that cannot be copied.
            self._tell("no good checkpoint can be taken", repr(error))
            self.last = self._trainer.global_step
            return
        if self.last is None:
            mib = self._copy.nbytes / 2**20
            log.info("LastKnownGood holds one copy of the checkpoint in memory, %.1f MiB now", mib)
        self._age, self._step = 0, self._trainer.global_step
        self._reference.begin(self._trainer, self._module)

    def _due(self) -> bool:
        waited = self.last is None or self._trainer.global_step - self.last >= self._every_n_steps
        return (
            waited
            and self._age is None
            and self._calm
            and not self.writer.busy
            and ends_window(self._trainer)
        )

    def healthy(self, state_key: str) -> None:
        """Count a healthy step; hand the copy to the writer once it is confirmed.

        Args:
            state_key: of the callback whose state the kept step goes into.
        """
        self._calm = True
        if self._age is None:
            return
        self._age += 1
        if self._age < self._confirm_after:
            return
        self._age, self.last = None, self._step
        self._reference.cancel()
        kept = self._reference.kept
        if kept is None:
            self._tell(
                "a resume cannot verify the state", self._reference.obstacle or "no step came"
            )
        else:
            kept |= {"loss": kept["loss"].cpu(), "step": self._step}
            self._copy.state["callbacks"][state_key]["kept"] = kept
        self.writer.write(self._copy.state, self._step, constants=self._constants)

    def discard(self) -> None:
        """Give up a copy that is not confirmed, and take none before a healthy step."""
        self._calm, self._age = False, None
        self._reference.cancel()

    def rolled_back(self) -> None:
        """Discard, and count from the step that was gone back to."""
        self.discard()
        if self.last is not None:
            self.last = min(self.last, self._trainer.global_step)

    def close(self) -> None:
        """Wait for the writer, and leave the module as it was found."""
        self._reference.cancel()
        self.writer.join()

    def _tell(self, what: str, why: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s: %s", what, why)
