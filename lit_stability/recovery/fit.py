"""`fit_with_recovery`: fits again and again until one comes through, or none can.

May import Lightning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lit_stability.recovery.attempt import Attempt, RemedyFailedError
from lit_stability.recovery.beginning import Beginning
from lit_stability.recovery.crashes import (
    Crash,
    first_line,
    forget_locals,
    free_memory,
    kind_of,
    place_of,
)
from lit_stability.recovery.record import RecoveryRecord
from lit_stability.recovery.remedies import GiveUp, Plan
from lit_stability.recovery.sources import Find, Sources
from lit_stability.recovery.trainers import Trainers, own_callbacks
from lit_stability.trainer_state import callbacks_of, run_directory


@dataclass(frozen=True, kw_only=True)
class Recover:
    """How much is put up with before a crash is let through.

    Raises:
        ValueError: if a number is out of its range.
    """

    max_crashes: int = 3
    """Crashes in a row that are recovered from; the next one is raised."""
    progress_steps: int = 100
    """Optimizer steps beyond the furthest crash after which crashes are counted anew."""

    def __post_init__(self) -> None:
        for name, least in (("max_crashes", 0), ("progress_steps", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")


@dataclass(frozen=True)
class RecoveryResult:
    """How a fit that came through went."""

    trainer: Trainer
    """That of the last attempt."""
    crashes: tuple[Crash, ...]
    remedies: tuple[str, ...]
    """What was done about each crash."""

    @property
    def attempts(self) -> int:
        """Fits begun."""
        return len(self.crashes) + 1


def fit_with_recovery(
    make_trainer: Callable[..., Trainer],
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    ckpt_path: str | Path | None = None,
    max_crashes: int = 3,
    progress_steps: int = 100,
    find: Find | None = None,
) -> RecoveryResult:
    """Fit, and after an exception fit again in this process from the last good checkpoint.

    Before a restart the memory of the failed fit is freed, and a remedy is chosen:

    * out of memory: the ``batch_size`` attribute of module or data module (the one that
      Lightning's batch size finder uses) is halved and ``accumulate_grad_batches`` doubled: the
      same samples in the same optimizer steps. Results are the same up to rounding where the loss
      is a mean over equally long micro-batches and no layer looks across samples. Where it cannot
      be halved: the module's ``enable_activation_checkpointing()`` or transformers'
      ``gradient_checkpointing_enable()``;
    * non-finite values, or `TrainingStopped`: learning rate and clip are halved, by way of the
      `AutoRollback`, which relaxes them again, or without one until that fit ends; the second time
      in a row the optimizer state is new too, the third time the precision is 32;
    * a batch that cannot be fetched: it is left out, whenever a batch of these samples comes;
    * anything else: a plain restart, and none if the same error comes back at the same step.

    Without a good checkpoint, and none in ``ckpt_path``, a restart begins from the module's initial
    state and the generators' of then. After ``max_crashes`` crashes in a row, or where no remedy is
    left, the exception is raised as it came, with a note of all that was tried. KeyboardInterrupt
    and SystemExit, and with it SIGTERM, are never recovered from. Every crash is one line on the
    console and one in ``recoveries.jsonl`` in the first trainer's ``log_dir``.

    Args:
        make_trainer: called as ``make_trainer(**overrides)`` for each fit, with options of the
            Trainer that override its own, none at first; returns a Trainer that is new, with new
            callbacks, such as ``lambda **overrides: Trainer(**{**options, **overrides},
            callbacks=stability_callbacks())``.
        model: in training; attributes of its own that no checkpoint holds are left as they are.
        datamodule: or None.
        train_dataloaders: as for ``Trainer.fit``; their batch size cannot be halved.
        val_dataloaders: as for ``Trainer.fit``.
        ckpt_path: checkpoint that the first fit goes on from.
        max_crashes: crashes in a row that are recovered from.
        progress_steps: optimizer steps beyond the furthest crash after which crashes are counted
            anew.
        find: finds the last good checkpoint in a fit's ``log_dir``; by default `find_last_good`,
            which knows those of `LastKnownGood`.

    Raises:
        ValueError: if an option is out of its range, or ``make_trainer`` is not as above.
        RuntimeError: on several devices.
    """
    limits = Recover(max_crashes=max_crashes, progress_steps=progress_steps)
    data = {
        "datamodule": datamodule,
        "train_dataloaders": train_dataloaders,
        "val_dataloaders": val_dataloaders,
    }
    sources = Sources(find, ckpt_path)
    return _Recovery(make_trainer, model, data, limits, sources).run()


class _Recovery:
    """One call of `fit_with_recovery`."""

    def __init__(
        self,
        make_trainer: Callable[..., Trainer],
        model: LightningModule,
        data: dict[str, Any],
        limits: Recover,
        sources: Sources,
    ) -> None:
        self._trainers = Trainers(make_trainer)
        self._model, self._data = model, data
        self._limits, self._sources = limits, sources
        self._plan = Plan(loaders_given=data["train_dataloaders"] is not None)
        self._beginning = Beginning(model)
        self._record: RecoveryRecord | None = None
        self._crashes: list[Crash] = []
        self._remedies: list[str] = []
        self._lines: list[str] = []
        self._in_a_row = 0
        self._furthest = 0

    def run(self) -> RecoveryResult:
        """Fit until one comes through."""
        before: Exception | None = None
        source = self._sources.given
        while True:
            trainer = self._trainer(before)
            attempt = Attempt(self._plan, first=not self._crashes, beginning=self._beginning)
            own_callbacks(trainer).insert(0, attempt)
            error = self._fit(trainer, attempt, source)
            if error is None:
                return RecoveryResult(trainer, tuple(self._crashes), tuple(self._remedies))
            if isinstance(error, RemedyFailedError) and before is not None:
                raise self._noted(before, str(error))
            reason = self._decide(error, trainer, attempt)
            if reason is not None:
                raise self._noted(error, reason)
            source = self._sources.newest()
            line = self._record_of(trainer).add(self._crashes[-1], self._remedies[-1], source)
            self._lines.append(line)
            self._release(trainer, attempt, error)
            before = error
            del trainer, attempt, error
            free_memory()
            self._beginning.restore(self._model)
            if source is None:
                self._beginning.restore_generators()

    def _trainer(self, before: Exception | None) -> Trainer:
        try:
            trainer = self._trainers.make(self._plan.overrides)
        except Exception as error:
            if before is None:
                raise
            refusal = f"make_trainer(**{self._plan.overrides}) cannot be used: {error!r}"
        else:
            if before is None:
                self._plan.accumulation = trainer.accumulate_grad_batches
            self._sources.add(run_directory(trainer))
            return trainer
        raise self._noted(before, refusal)

    def _record_of(self, trainer: Trainer) -> RecoveryRecord:
        if self._record is None:
            self._record = RecoveryRecord(run_directory(trainer))
        return self._record

    def _fit(self, trainer: Trainer, attempt: Attempt, source: Path | str | None) -> Any:
        """The exception that ended a fit, or None."""
        try:
            trainer.fit(self._model, **self._data, ckpt_path=source)
        except Exception as error:
            noted = attempt.error
            if noted is None or error is noted:
                return error
            # A callback that failed over the first one kept the trainer from cleaning up.
            with contextlib.suppress(Exception):
                trainer._teardown()
            return noted
        return None

    def _decide(self, error: Exception, trainer: Trainer, attempt: Attempt) -> str | None:
        """Choose a remedy; returns why there is none, or None."""
        crash = self._crash(error, attempt)
        self._crashes.append(crash)
        try:
            if crash.in_a_row > self._limits.max_crashes:
                raise GiveUp(
                    f"{crash.in_a_row} crashes in a row, max_crashes={self._limits.max_crashes}"
                )
            self._remedies.append(self._plan.choose(crash, trainer, self._model))
        except GiveUp as end:
            self._lines.append(self._record_of(trainer).give_up(crash, str(end)))
            return str(end)
        return None

    def _crash(self, error: Exception, attempt: Attempt) -> Crash:
        step, epoch, begun = attempt.position
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
            message=first_line(error),
            place=place_of(error),
            step=step,
            epoch=epoch,
            batch_idx=begun if kind == "data" else max(0, begun - 1),
            samples=attempt.not_fetched if kind == "data" else None,
            in_a_row=self._in_a_row,
        )

    def _noted(self, error: Exception, reason: str) -> Exception:
        tried = "".join(f"\n  {line}" for line in self._lines)
        error.add_note(
            f"fit_with_recovery gave up: {reason}.{' It went:' + tried if tried else ''}"
        )
        return error

    def _release(self, trainer: Trainer, attempt: Attempt, error: Exception) -> None:
        """Let go of all that a failed fit holds."""
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
