"""Recovery of several ranks: one fit in each process; torchrun restarts all of them.

May import Lightning.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import Trainer
from lit_stability.outside import guarded
from lit_stability.restart.callback import RestartCallback, SmallerMicroBatchesError
from lit_stability.restart.loop import Recovery, RecoveryResult
from lit_stability.restart.memory import checkpoint_activations
from lit_stability.restart.rank_records import RankRecords, RecoveryState, crash_of
from lit_stability.restart.record import RecoveryRecord
from lit_stability.restart.remedies import GiveUp, Plan
from lit_stability.restart.torchrun import attempt, from_rank_0, run_id, use_new_store
from lit_stability.restart.trainers import own_callbacks
from lit_stability.trainer_internals import keep_records_in, local_path, run_directory

log = suite_logger()

SECONDS_TO_END = 30
"""How long after an exception a process ends, even if it waits for others that do not answer."""


class RankRecovery(Recovery):
    """One attempt of `fit_with_recovery` on this rank.

    A process cannot start a fit a second time, because the other ranks are still in the first. So
    it records its crash and what to change, and raises; torchrun ends the others and starts all
    processes again. These read the record of the rank that crashed first.
    """

    _new_process = True

    def run(self) -> RecoveryResult:
        """Fits once; on a crash writes the record and raises the exception."""
        trainer = self._trainers.make({})
        root = local_path(trainer.default_root_dir)
        if root is None:
            raise ValueError(
                f"default_root_dir={trainer.default_root_dir!r} is not on a local file system, "
                "where the ranks keep the records of their crashes"
            )
        records = RankRecords(root / f"recovery-{run_id()}", attempt())
        self._load(json.loads(from_rank_0(lambda: self._agreed(records))))
        use_new_store()
        if self._plan.overrides:
            trainer = self._trainers.make(self._plan.overrides)
        if not self._crashes:
            self._plan.accumulation = trainer.accumulate_grad_batches
        if self._plan.checkpoints_activations:
            checkpoint_activations(self._model)
        if self._folder is not None and not trainer.loggers:
            keep_records_in(trainer, self._folder)
        callback = RestartCallback(
            self._plan,
            first=attempt() == 0,
            initial_state=None,
            batch_size=self._batch_size,
            on_setup=lambda trainer: self._started(trainer, records),
        )
        own_callbacks(trainer).insert(0, callback)
        error = self._fit(trainer, callback, self._source)
        if error is None:
            return RecoveryResult(trainer, tuple(self._crashes), tuple(self._remedies))
        _end_within(SECONDS_TO_END)
        raise self._crashed(error, trainer, callback, records)

    def _agreed(self, records: RankRecords) -> str:
        """Returns, on rank 0, what all ranks do in this attempt."""
        records.begin()
        state, ended = records.state()
        folders = records.folders()
        self._sources.restore(folders)
        source = self._sources.newest()
        if ended:
            log.warning(
                "restart %d: %s; %s",
                *(attempt(), ended, f"resuming from {source}" if source else "from the start"),
            )
        agreed = {
            "state": state.to_json(),
            "source": None if source is None else str(source),
            "folder": str(next(reversed(folders))) if folders else None,
        }
        return json.dumps(agreed)

    def _load(self, agreed: dict[str, Any]) -> None:
        """Continues the recovery of the processes before.

        Raises:
            RuntimeError: if they have found no remedy.
        """
        state, self._source = RecoveryState.from_json(agreed["state"]), agreed["source"]
        if state.gave_up is not None:
            raise RuntimeError(f"fit_with_recovery gave up before: {state.gave_up}")
        self._folder = None if agreed["folder"] is None else Path(agreed["folder"])
        if state.plan:
            self._plan = Plan.from_plain(state.plan)
        self._batch_size = state.batch_size
        self._in_a_row, self._furthest = state.in_a_row, state.furthest
        self._crashes = [crash_of(row) for row in state.crashes]
        self._remedies, self._lines = list(state.remedies), list(state.lines)

    def _started(self, trainer: Trainer, records: RankRecords) -> None:
        folder = run_directory(trainer)  # on all ranks
        if folder is None or not trainer.is_global_zero:
            return
        self._report(folder)
        guarded(
            *(self, "the folder of this fit cannot be recorded"),
            lambda: records.started(folder, self._sources.found_in(folder)),
        )

    def _report(self, folder: Path) -> None:
        """Adds the crash before to the records of crashes, as rank 0 alone can: it may be any's."""
        if self._crashes:
            record = RecoveryRecord(folder)
            record.write(self._crashes[-1], self._remedies[-1], self._source, "restart")

    def _crashed(
        self, error: Exception, trainer: Trainer, callback: RestartCallback, records: RankRecords
    ) -> Exception:
        """Records the crash; returns the exception with a note of what was tried."""
        crash = self._crash(error, callback)
        self._crashes.append(crash)
        if isinstance(error, SmallerMicroBatchesError):
            reason = self._split(error.parts, trainer)
        else:
            reason = self._choose(crash, trainer)
        change = self._remedies[-1] if reason is None else f"gave up: {reason}"
        self._lines.append(f"{crash.in_words()} -> {change}")
        state = RecoveryState(
            plan=self._plan.to_plain(),
            batch_size=callback.halved_batch_size(),
            in_a_row=self._in_a_row,
            furthest=self._furthest,
            crashes=[asdict(each) for each in self._crashes],
            remedies=self._remedies,
            lines=self._lines,
            gave_up=reason,
        )
        try:
            file = records.crashed(trainer.global_rank, state)
        except (OSError, TypeError) as problem:
            # A sample may be any object; then the next attempt changes nothing.
            log.warning("the crash cannot be recorded: %s", problem)
            return error
        log.warning("rank %d: %s (%s)", trainer.global_rank, self._lines[-1], file)
        return error if reason is None else self._with_note(error, reason)

    def _split(self, parts: int, trainer: Trainer) -> str | None:
        """Splits batches as in the run that wrote the checkpoint; returns why not, or None."""
        try:
            self._remedies.append(self._plan.adopt(parts, trainer, self._model))
        except GiveUp as end:
            return str(end)
        return None


def _end_within(seconds: float) -> None:
    """Ends the process after some time, as it may wait for ranks that no longer answer."""

    def end() -> None:
        time.sleep(seconds)
        log.warning("the process did not end within %d seconds of the exception", seconds)
        os._exit(1)

    threading.Thread(target=end, name="end after an exception", daemon=True).start()
