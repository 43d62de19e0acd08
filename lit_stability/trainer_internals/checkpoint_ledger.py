"""Checkpoint files written and removed since a snapshot, so that a rollback can take them back."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

log = logging.getLogger("lightning.pytorch.lit_stability")


@dataclass(frozen=True)
class _Removal:
    path: Path
    hidden: Path


class CheckpointLedger:
    """Watches the strategy's files between ``attach`` and ``detach``.

    A file written since a point that is gone back to is renamed to ``NAME.quarantined``: its
    weights may be damaged. A file removed since then comes back: a removal hides it first, as
    ``.NAME.removed`` in the same folder, and is carried out once nothing can go back before it.

    Args:
        trainer: whose strategy to watch; files are touched on rank zero only.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._events: list[Path | _Removal] = []
        self._first = 0
        self._attached = False

    def attach(self) -> None:
        """Begin to watch, and finish removals that a kill interrupted."""
        strategy = self._trainer.strategy
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_checkpoint(checkpoint: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
            save(checkpoint, filepath, *args, **kwargs)
            self._events.append(Path(filepath))

        def remove_checkpoint(filepath: Any) -> None:
            if not self._hide(Path(filepath)):
                remove(filepath)

        self._remove = remove
        strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
        strategy.remove_checkpoint = remove_checkpoint  # type: ignore[method-assign]
        self._attached = True
        if self._trainer.is_global_zero:
            for folder in _folders(self._trainer):
                for left_by_a_kill in folder.glob(".*.removed"):
                    self._remove(left_by_a_kill)

    def detach(self) -> None:
        """Carry out all removals and leave the strategy as it was."""
        if not self._attached:
            return
        self.commit(self.mark)
        for name in ("save_checkpoint", "remove_checkpoint"):
            vars(self._trainer.strategy).pop(name, None)
        self._attached = False

    @property
    def mark(self) -> int:
        """The present moment, to be gone back to."""
        return self._first + len(self._events)

    def commit(self, mark: int) -> None:
        """Carry out the removals before a mark: nothing goes back beyond it any more."""
        while self._first < mark and self._events:
            event = self._events.pop(0)
            self._first += 1
            if isinstance(event, _Removal):
                self._remove(event.hidden)

    def go_back(self, mark: int) -> list[Path]:
        """Undo removals and quarantine what was written since a mark; returns the new names."""
        quarantined = []
        while self.mark > mark and self._events:
            event = self._events.pop()
            try:
                if isinstance(event, _Removal):
                    os.replace(event.hidden, event.path)
                elif event.exists() and self._trainer.is_global_zero:
                    quarantined.append(_quarantine(event))
            except OSError as error:
                log.warning("cannot rename %s (%s)", event, error)
        return quarantined

    def _hide(self, path: Path) -> bool:
        if not self._trainer.is_global_zero or not path.exists():
            return False
        hidden = path.with_name(f".{path.name}.removed")
        try:
            os.replace(path, hidden)
        except OSError:
            return False
        self._events.append(_Removal(path, hidden))
        return True


def _folders(trainer: Trainer) -> list[Path]:
    found = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return [Path(each) for each in found if each is not None]


def _quarantine(path: Path) -> Path:
    new = path.with_name(f"{path.name}.quarantined")
    number = 1
    while new.exists():
        new = path.with_name(f"{path.name}.quarantined.{number}")
        number += 1
    os.replace(path, new)
    return new
