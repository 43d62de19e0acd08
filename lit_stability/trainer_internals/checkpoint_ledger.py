"""Tracks checkpoint files written or removed since a snapshot, so that a rollback can undo both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import ModelCheckpoint, Trainer
from lit_stability.trainer_internals.patch import Patch

log = suite_logger()


@dataclass(frozen=True)
class _Removal:
    path: Path
    hidden: Path


class CheckpointLedger:
    """Records the files that the strategy writes and removes between ``attach`` and ``detach``.

    A rollback to a mark renames files written since then to ``NAME.quarantined``, as their weights
    may be damaged, and restores files removed since then. To make this possible, a removal only
    renames the file to ``.NAME.removed`` in the same folder; the file is deleted when no rollback
    can go back before the removal. Files whose name starts with a dot, such as those in which a
    tuner keeps the state, are temporary and not recorded.

    Args:
        trainer: owner of the strategy; files are changed on rank 0 only.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._events: list[Path | _Removal] = []
        self._first = 0
        self._patches: list[Patch] = []

    def attach(self) -> None:
        """Starts recording, and deletes hidden files of a run that was killed."""
        strategy = self._trainer.strategy
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_checkpoint(checkpoint: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
            save(checkpoint, filepath, *args, **kwargs)
            if not _is_temporary(Path(filepath)):
                self._events.append(Path(filepath))

        def remove_checkpoint(filepath: Any) -> None:
            if not self._hide(Path(filepath)):
                remove(filepath)

        self._remove = remove
        self._patches = [
            Patch(strategy, "save_checkpoint", save_checkpoint),
            Patch(strategy, "remove_checkpoint", remove_checkpoint),
        ]
        for patch in self._patches:
            patch.apply()
        if self._trainer.is_global_zero:
            for folder in _folders(self._trainer):
                for hidden in folder.glob(".*.removed"):
                    self._remove(hidden)

    def detach(self) -> None:
        """Deletes all hidden files and restores the methods of the strategy."""
        if not self._patches:
            return
        self.commit(self.mark)
        for patch in self._patches:
            patch.remove()
        self._patches = []

    @property
    def mark(self) -> int:
        """The current position in the record, for `commit` and `go_back`."""
        return self._first + len(self._events)

    def commit(self, mark: int) -> None:
        """Deletes the files hidden before a mark: no rollback goes back further."""
        while self._first < mark and self._events:
            event = self._events.pop(0)
            self._first += 1
            if isinstance(event, _Removal):
                self._remove(event.hidden)

    def go_back(self, mark: int) -> list[Path]:
        """Restores files removed, and quarantines files written, since a mark.

        Returns:
            New names of the quarantined files.
        """
        quarantined = []
        while self.mark > mark and self._events:
            event = self._events.pop()
            try:
                if isinstance(event, _Removal):
                    os.replace(event.hidden, event.path)
                elif event.exists() and self._trainer.is_global_zero:
                    quarantined.append(_quarantine(event))
            except OSError as error:
                log.warning("cannot rename checkpoint %s (%s): it is unchanged", event, error)
        return quarantined

    def _hide(self, path: Path) -> bool:
        if not self._trainer.is_global_zero or _is_temporary(path) or not path.exists():
            return False
        hidden = path.with_name(f".{path.name}.removed")
        try:
            os.replace(path, hidden)
        except OSError:
            return False
        self._events.append(_Removal(path, hidden))
        return True


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".")


def _folders(trainer: Trainer) -> list[Path]:
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    # A subclass with an `__init__` of its own may have none.
    paths = [getattr(c, "dirpath", None) for c in callbacks]
    return [Path(path) for path in paths if path is not None]


def _quarantine(path: Path) -> Path:
    new = path.with_name(f"{path.name}.quarantined")
    number = 1
    while new.exists():
        new = path.with_name(f"{path.name}.quarantined.{number}")
        number += 1
    os.replace(path, new)
    return new
