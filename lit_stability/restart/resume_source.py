"""Finds the checkpoint that a restart resumes from.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from lit_stability.lightning_choice import suite_logger
from lit_stability.training_state.good_checkpoints import find_last_good

log = suite_logger()

Find: TypeAlias = Callable[[Path], Path | str | None]


class ResumeSource:
    """Finds checkpoints in the folders that the fits of one recovery write to.

    A checkpoint that was in a folder before the first fit wrote there belongs to another run and
    is ignored.

    Args:
        find: finds the last good checkpoint below a folder; None for `find_last_good`.
        given: checkpoint that the first fit resumes from.
    """

    def __init__(self, find: Find | None, given: str | Path | None) -> None:
        self._find = find or find_last_good
        self.given = given
        """Checkpoint that a restart resumes from until the recovery has written one."""
        self._before: dict[Path, tuple[Path, int] | None] = {}

    def add(self, folder: Path | None) -> None:
        """Adds the folder of a fit that is about to start."""
        if folder is not None and folder not in self._before:
            self._before[folder] = self.found_in(folder)

    def restore(self, before: dict[Path, tuple[Path, int] | None]) -> None:
        """Continues with the folders of fits in earlier processes, and what was in them."""
        self._before = dict(before)

    def newest(self) -> Path | str | None:
        """Returns the last good checkpoint of the latest fit that wrote one, or ``given``."""
        for folder in reversed(self._before):
            found = self.found_in(folder)
            if found is not None and found != self._before[folder]:
                return found[0]
        return self.given

    def found_in(self, folder: Path) -> tuple[Path, int] | None:
        """Returns the last good checkpoint in a folder, and the time in ns when it was written."""
        try:
            path = self._find(folder) if folder.is_dir() else None
            return None if path is None else (Path(path), Path(path).stat().st_mtime_ns)
        except OSError as error:
            log.warning("cannot search %s for a checkpoint (%s); it is ignored", folder, error)
            return None
