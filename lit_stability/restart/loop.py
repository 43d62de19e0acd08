"""The recovery loop: fit, classify the crash, choose a remedy, fit again.

May import Lightning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_stability.callbacks.requirements import run_of
from lit_stability.compat import add_note
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.restart.callback import (
    RemedyFailedError,
    RestartCallback,
    SmallerMicroBatchesError,
)
from lit_stability.restart.crashes import (
    Crash,
    free_memory,
    headline,
    kind_of,
    place_of,
)
from lit_stability.restart.initial_state import InitialState
from lit_stability.restart.record import RecoveryRecord
from lit_stability.restart.remedies import GiveUp, Plan
from lit_stability.restart.resume_source import ResumeSource
from lit_stability.restart.trainers import Trainers, own_callbacks
from lit_stability.trainer_internals import callbacks_of, keep_records_in, run_directory, tear_down
from lit_stability.training_state.out_of_memory import forget_locals

log = suite_logger()


@dataclass(frozen=True, kw_only=True)
class Recover:
    """Limits of the recovery from crashes.

    Raises:
        ValueError: if a number is out of range.
    """

    max_crashes: int = 3
    """Number of consecutive crashes that are recovered from; the next one is raised."""
    progress_steps: int = 100
    """Optimizer steps past the furthest crash after which the count starts again at zero."""

    def __post_init__(self) -> None:
        for name, least in (("max_crashes", 0), ("progress_steps", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")


@dataclass(frozen=True)
class RecoveryResult:
    """Result of a fit that finished: its trainer, and the crashes before it."""

    trainer: Trainer
    """The trainer of the last restart attempt."""
    crashes: tuple[Crash, ...]
    remedies: tuple[str, ...]
    """What was changed after each crash."""

    @property
    def attempts(self) -> int:
        """Returns the number of fits started."""
        return len(self.crashes) + 1


class Recovery:
    """One call of `fit_with_recovery` in one process, which starts all fits.

    Args:
        make_trainer: builds the trainer of each fit.
        model: the module to train.
        data: the data arguments of ``Trainer.fit``.
        limits: how many crashes are recovered from.
        sources: finds the checkpoint that a fit resumes from.
    """

    _new_process = False
    """Whether the next fit is in another process, which builds its own module."""

    def __init__(
        self,
        make_trainer: Callable[..., Trainer],
        model: LightningModule,
        data: dict[str, Any],
        limits: Recover,
        sources: ResumeSource,
    ) -> None:
        self._trainers = Trainers(make_trainer)
        self._model, self._data = model, data
        self._limits, self._sources = limits, sources
        self._plan = Plan(loaders_given=data["train_dataloaders"] is not None)
        self._initial_state = None if self._new_process else InitialState(model)
        self._record: RecoveryRecord | None = None
        self._folder: Path | None = None
        """The folder of the first fit without a logger, in which the others go on."""
        self._crashes: list[Crash] = []
        self._remedies: list[str] = []
        self._lines: list[str] = []
        self._in_a_row = 0
        self._furthest = 0

    def run(self) -> RecoveryResult:
        """Fits until a fit finishes; raises the exception of the last fit if none does."""
        assert self._initial_state is not None
        previous: Exception | None = None
        source = self._sources.given
        while True:
            trainer = self._trainer(previous)
            attempt = RestartCallback(
                self._plan,
                first=self._is_first,
                initial_state=self._initial_state,
                on_setup=self._add_folder,
            )
            own_callbacks(trainer).insert(0, attempt)
            error = self._fit(trainer, attempt, source)
            if error is None:
                return RecoveryResult(trainer, tuple(self._crashes), tuple(self._remedies))
            if isinstance(error, RemedyFailedError) and previous is not None:
                raise self._with_note(previous, str(error))
            if isinstance(error, SmallerMicroBatchesError):
                self._adopt(error, trainer)
            else:
                source = self._recover(error, trainer, attempt)
                previous = error
            self._release(trainer, attempt, error)
            del trainer, attempt, error
            free_memory()
            self._initial_state.restore(self._model)
            if source is None:
                self._initial_state.restore_generators()

    @property
    def _is_first(self) -> bool:
        return not self._crashes and self._plan.parts == 1

    def _adopt(self, error: SmallerMicroBatchesError, trainer: Trainer) -> None:
        """Splits batches as in the run that wrote the given checkpoint."""
        try:
            change = self._plan.adopt(error.parts, trainer, self._model)
        except GiveUp as end:
            raise ValueError(str(end)) from None
        log.info("as in the run that wrote %s: %s", self._sources.given, change)

    def _recover(
        self, error: Exception, trainer: Trainer, attempt: RestartCallback
    ) -> Path | str | None:
        """Chooses a remedy and returns the checkpoint to resume from, or raises the error."""
        crash = self._crash(error, attempt)
        self._crashes.append(crash)
        reason = self._choose(crash, trainer)
        if reason is not None:
            self._lines.append(self._record_of(trainer).give_up(crash, reason))
            raise self._with_note(error, reason)
        source = self._sources.newest()
        self._lines.append(self._record_of(trainer).add(crash, self._remedies[-1], source))
        return source

    def _choose(self, crash: Crash, trainer: Trainer) -> str | None:
        """Chooses a remedy; returns the reason if there is none, otherwise None."""
        limit = self._limits.max_crashes
        if crash.in_a_row > limit:
            return f"{crash.in_a_row} crashes in a row, max_crashes={limit}"
        try:
            choice = self._plan.choose(crash, trainer, self._model, new_process=self._new_process)
            self._remedies.append(choice)
        except GiveUp as end:
            return str(end)
        return None

    def _trainer(self, previous: Exception | None) -> Trainer:
        try:
            trainer = self._trainers.make(self._plan.overrides)
        except Exception as error:
            if previous is None:
                raise
            reason = f"make_trainer(**{self._plan.overrides}) cannot be used: {error!r}"
        else:
            if self._is_first:
                self._plan.accumulation = trainer.accumulate_grad_batches
            if self._folder is not None and not trainer.loggers:
                keep_records_in(trainer, self._folder)
            return trainer
        raise self._with_note(previous, reason)

    def _add_folder(self, trainer: Trainer) -> None:
        """Adds the folder of a fit whose loggers have their version by now."""
        folder = run_directory(trainer)
        self._sources.add(folder)
        if not trainer.loggers:
            self._folder = folder

    def _record_of(self, trainer: Trainer) -> RecoveryRecord:
        if self._record is None:
            self._record = RecoveryRecord(run_directory(trainer), run_of(trainer))
        return self._record

    def _fit(self, trainer: Trainer, attempt: RestartCallback, source: Path | str | None) -> Any:
        """Runs a fit and returns the exception that ended it, or None."""
        try:
            trainer.fit(self._model, **self._data, ckpt_path=source)
        except Exception as error:
            first = attempt.error
            if first is None or error is first:
                return error
            # A callback raised while handling the first error, so the trainer did not clean up.
            with contextlib.suppress(Exception):
                tear_down(trainer)
            return first
        return None

    def _crash(self, error: Exception, attempt: RestartCallback) -> Crash:
        step, epoch, started = attempt.position
        kind = kind_of(error)
        if self._in_a_row and step >= self._furthest + self._limits.progress_steps:
            self._in_a_row = 0
            self._plan.made_progress()
        self._furthest = max(self._furthest, step)
        self._in_a_row += 1
        return Crash(
            attempt=len(self._crashes) + 1,
            kind=kind,
            error=type(error).__name__,
            message=headline(error),
            place=place_of(error),
            step=step,
            epoch=epoch,
            batch_idx=started if kind == "data" else max(0, started - 1),
            samples=attempt.not_fetched if kind == "data" else None,
            in_a_row=self._in_a_row,
        )

    def _with_note(self, error: Exception, reason: str) -> Exception:
        tried = "".join(f"\n  {line}" for line in self._lines)
        crashes = " Crashes so far:" + tried if tried else ""
        add_note(error, f"fit_with_recovery gave up: {reason}.{crashes}")
        return error

    def _release(self, trainer: Trainer, attempt: RestartCallback, error: Exception) -> None:
        """Tears down a failed fit and drops its references, so that its memory can be freed."""
        module, datamodule = self._model, self._data["datamodule"]
        for callback in callbacks_of(trainer):
            with contextlib.suppress(Exception):
                callback.teardown(trainer, module, stage="fit")
        for owner in (module, datamodule):
            if owner is not None:
                with contextlib.suppress(Exception):
                    owner.teardown("fit")
                owner.trainer = None
        attempt.error = None
        forget_locals(error)
