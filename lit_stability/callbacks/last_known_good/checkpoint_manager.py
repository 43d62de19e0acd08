"""Copies the state, waits for healthy steps to confirm the copy, and hands it to the writer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals import ReferenceStep, adapter_of, ends_window, sharing
from lit_stability.training_state.async_writer import AsyncCheckpointWriter
from lit_stability.training_state.byte_sizes import as_text
from lit_stability.training_state.copies import copies_to_host
from lit_stability.training_state.host_copy import HostCopy, is_finite
from lit_stability.training_state.step_barrier import StepBarrier

log = suite_logger()


class CheckpointManager:
    """Manages one copy of the state at a time: due, taken, waiting for confirmation, written.

    On an accelerator, weights and moments are copied while the program goes on, and the device
    makes its next step after that. A copy of weights that the program wrote meanwhile is discarded;
    the next one is taken after the next healthy step, and the device waits for it at once. The
    forward pass does not run beside a copy: that gains little, as copies are rare, and a write by
    way of ``data``, which no version counter shows, would be in a file that is called good.

    On several ranks all take a copy at the same time, and all hand it over or none does: they agree
    before each, between two batches. On the other steps they exchange nothing.

    Args:
        trainer: of the fit.
        pl_module: the module in training.
        writer: writes confirmed copies.
        gather: returns a value of every rank; all ranks call it, or none.
        state_key: state key of the callback whose state the kept step is added to.
        every_n_steps: optimizer steps between copies.
        confirm_after: healthy steps after which a copy is good.
        max_batch_bytes: largest size of the batch that is kept with a copy.
        every_n_seconds: seconds after which a copy is due as well; None for no such bound.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        writer: AsyncCheckpointWriter,
        gather: Callable[[Any], list[Any]],
        state_key: str,
        *,
        every_n_steps: int,
        confirm_after: int,
        max_batch_bytes: int,
        every_n_seconds: float | None = None,
    ) -> None:
        self.writer = writer
        self.last: int | None = None
        """Step of the newest confirmed copy, or of the checkpoint that the fit resumed from."""
        self._trainer, self._module = trainer, pl_module
        self._gather, self._state_key = gather, state_key
        self._sharing = sharing(trainer)
        self._every_n_steps, self._confirm_after = every_n_steps, confirm_after
        self._every_n_seconds, self._taken_at = every_n_seconds, time.monotonic()
        self._time_is_up = False
        """Whether all ranks know that a copy is due because of the time."""
        self._nonfinite_buffers = [n for n, b in pl_module.named_buffers() if not is_finite(b)]
        copies = copies_to_host(trainer.strategy.root_device)
        self._copy, self._barrier = HostCopy(copies), StepBarrier(copies)
        self._has_torn = False
        """Whether the program wrote weights or moments while they were copied, once or more."""
        self._torn = False
        """Whether it did while the present copy was made."""
        self._reference = ReferenceStep(max_batch_bytes)
        self._healthy = True
        self._healthy_steps: int | None = None
        self._step = 0
        self._warned: set[str] = set()

    def between_batches(self, checkpoint: Callable[[], dict[str, Any]]) -> None:
        """Hands over a copy that is confirmed; takes one if one is due.

        Args:
            checkpoint: returns the checkpoint to copy.
        """
        if self._confirmed:
            self._hand_over()
        if not self._due():
            return
        error: Exception | None = None
        try:
            self._copy.capture(checkpoint(), steady=_stepped(self._trainer, self._module))
        except Exception as problem:
            # A user's hook that raises, or an object that cannot be copied.
            error = problem
        failed = [text for text in self._gather(error and repr(error)) if text]
        if failed:
            self._warn_once("no good checkpoint can be taken", failed[0])
            self.last = self._trainer.global_step
            return
        self._healthy_steps, self._step, self._torn = 0, self._trainer.global_step, False
        self._taken_at, self._time_is_up = time.monotonic(), False
        self._barrier.follow(self._trainer.optimizers)
        self._barrier.begin(written=lambda: self._copy.written, torn=self._note_torn)
        if self._has_torn:
            self._barrier.wait()
        self._reference.begin(self._trainer, self._module)

    def startup_text(self) -> str:
        """Returns how often a checkpoint is kept, and what its copy in memory takes.

        Of sharded weights the first copy is taken after the first step.
        """
        size = f", {as_text(self._copy.nbytes)}" if self._copy.nbytes else ""
        seconds = self._every_n_seconds
        time_too = "" if seconds is None else f" or {seconds / 60:g} min"
        return f"a good checkpoint every {self._every_n_steps} steps{time_too}{size}"

    def _due(self) -> bool:
        step = self._trainer.global_step
        waited = self.last is None or step - self.last >= self._every_n_steps
        if self._sharing == "alone":
            self._time_is_up = self.waited_long
        waited = waited or (self._time_is_up and step != self.last)
        # To name the shards of optimizer states, torch would make a step where there is no state.
        exists = step > 0 or self._sharing != "shards"
        return (
            waited
            and exists
            and self._healthy_steps is None
            and self._healthy
            and ends_window(self._trainer)
            and not any(self._gather(self.writer.busy))
        )

    @property
    def waited_long(self) -> bool:
        """Whether the last copy was taken so long ago that one is due on this rank."""
        limit = self._every_n_seconds
        return limit is not None and time.monotonic() - self._taken_at >= limit

    def time_is_up(self) -> None:
        """Notes that `waited_long` is true on a rank; all ranks note it in the same step."""
        self._time_is_up = True

    def healthy(self) -> None:
        """Counts a healthy step; on one device hands over a copy that is confirmed by it.

        Several ranks hand it over between two batches, when all of them have accepted the step.
        """
        self._healthy = True
        if self._healthy_steps is not None:
            self._healthy_steps += 1
        if self._sharing == "alone" and self._confirmed:
            self._hand_over()

    @property
    def _confirmed(self) -> bool:
        return self._healthy_steps is not None and self._healthy_steps >= self._confirm_after

    def _hand_over(self) -> None:
        """Hands the copy to the writer, unless it is torn or a rank without one is damaged."""
        self._barrier.finish()
        found = self._gather((self._torn, self._damage()))
        if any(torn for torn, _ in found):
            self.discard(healthy=True)
            return
        bad = next((f"rank {r}: {name}" for r, (_, name) in enumerate(found) if name), None)
        if bad is not None:
            self._warn_once(f"no good checkpoint written at step {self._step}", bad)
            self.discard()
            return
        self._healthy_steps, self.last = None, self._step
        self._reference.cancel()
        kept = self._reference.kept
        if kept is None:
            self._note_once(self._reference.obstacle or "no step followed")
        else:
            kept |= {"loss": kept["loss"].cpu(), "step": self._step}
            self._copy.state["callbacks"][self._state_key]["kept"] = kept
        self.writer.write(self._copy.state, self._step, constants=self._nonfinite_buffers)

    def _damage(self) -> str | None:
        """Returns what is non-finite in weights of which the copy is not checked itself.

        That is where a replica has none, or has files of a library. A NaN does not go away.
        """
        if (damaged := adapter_of(self._trainer).damaged()) is not None:
            return damaged
        if self._sharing != "replicas" or self._trainer.is_global_zero:
            return None
        module, constants = self._module, self._nonfinite_buffers
        named = [*module.named_parameters(), *module.named_buffers()]
        bad = (name for name, t in named if name not in constants and not is_finite(t))
        moments = _moments(self._trainer)
        return next(bad, None if all(map(is_finite, moments)) else "optimizer state")

    def discard(self, *, healthy: bool = False) -> None:
        """Discards a copy that is not confirmed.

        Args:
            healthy: whether the next copy may be taken at once; else after the next healthy step.
        """
        self._healthy, self._healthy_steps = healthy, None
        self._reference.cancel()

    def _note_torn(self) -> None:
        # A program that has written weights may do so again: no copy might ever be whole.
        self._has_torn = self._torn = True

    def rolled_back(self) -> None:
        """Discards the copy, and counts from the step rolled back to."""
        self.discard()
        if self.last is not None:
            self.last = min(self.last, self._trainer.global_step)

    def close(self, *, together: bool) -> None:
        """Waits for the writer, and leaves the module as it was before the fit.

        Args:
            together: whether all ranks are here, so that they can hand over a confirmed copy.
        """
        if together and self._confirmed:
            self._hand_over()
        self._reference.cancel()
        self._barrier.close()
        self.writer.join()

    def write_now(self, checkpoint: Mapping[str, Any]) -> Callable[[], None]:
        """Copies a checkpoint that needs no confirmation, after `close`.

        Args:
            checkpoint: of the state that the fit is in now.

        Returns:
            Writes the copy; the state may change before.
        """
        step = self._trainer.global_step
        self._copy.capture(checkpoint)
        self._copy.finish()

        def write() -> None:
            self.writer.write(self._copy.state, step, constants=self._nonfinite_buffers)
            self.writer.join()
            self.last = step

        return write

    def _note_once(self, obstacle: str) -> None:
        """Logs why a resume will not be verified; nothing is wrong with the run."""
        if obstacle not in self._warned:
            self._warned.add(obstacle)
            log.info("a resume will not verify the restored state: %s", obstacle)

    def _warn_once(self, problem: str, reason: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            log.warning("%s: %s", problem, reason)


def _stepped(trainer: Trainer, pl_module: LightningModule) -> list[Tensor]:
    """Returns weights and moments: they change in the steps of optimizers, and only there."""
    return [*(p for p in pl_module.parameters() if p.requires_grad), *_moments(trainer)]


def _moments(trainer: Trainer) -> list[Tensor]:
    states = (state for o in trainer.optimizers for state in o.state.values())
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
