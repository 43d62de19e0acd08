"""Writes checkpoints in the background, whole or not at all.

May import torch; knows no Lightning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from lit_stability.training_state.atomic_write import write_atomically
from lit_stability.training_state.good_checkpoints import free_path, good_files, step_of
from lit_stability.training_state.host_copy import first_nonfinite

log = logging.getLogger("lightning.pytorch.lit_stability")

_PATIENCE = 600.0
"""Seconds to wait at the end of a fit for a disk that may have died."""


class AsyncCheckpointWriter:
    """Writes one checkpoint at a time in a thread that lives as long as the writing.

    A file appears under its name only when it is whole and on the disk; a number already taken
    gets a suffix. What cannot be written is told of once, and training goes on.

    Args:
        folder: where to write; created with the first file.
        keep: files to keep, the newest by step; those of later steps, left there by a run that
            went further, are not touched.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.newest: Path | None = None
        """The last file written."""
        self._thread: threading.Thread | None = None
        self._told = False

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written: its tensors must not change."""
        return self._thread is not None and self._thread.is_alive()

    def write(
        self, state: Mapping[str, Any], step: int, *, constants: Collection[str] = ()
    ) -> None:
        """Begin to write.

        Args:
            state: the checkpoint; not to be changed until the writer is no longer `busy`.
            step: the step it was taken at.
            constants: names of buffers that are non-finite on purpose.
        """
        assert not self.busy, "one at a time"
        self._thread = threading.Thread(
            target=self._run, args=(state, step, constants), name="last known good", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait until what is being written is written, for ten minutes at most."""
        if self._thread is None:
            return
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            log.warning("%s has taken a write for ten minutes: given up", self.folder)

    def _run(self, state: Mapping[str, Any], step: int, constants: Collection[str]) -> None:
        started = time.perf_counter()
        try:
            bad = first_nonfinite(state, constants)
            if bad is not None:
                log.warning("the state of step %d is refused: %s is non-finite", step, bad)
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            path = free_path(self.folder, step)
            write_whole(state, path)
            self.newest = path
            self._prune(step)
            seconds = time.perf_counter() - started
            log.debug("%s written in %.2f s", path, seconds)
        except Exception as error:
            # A full disk, an object that does not pickle: never what ends the run.
            if not self._told:
                log.warning(
                    "the last known good checkpoint of step %d was not written to %s (%s); "
                    "training goes on, this is told once",
                    *(step, self.folder, error),
                )
            self._told = True

    def _prune(self, step: int) -> None:
        older = [f for f in good_files(self.folder) if step_of(f) <= step]
        for file in older[: -self.keep]:
            file.unlink(missing_ok=True)


def write_whole(state: Mapping[str, Any], path: Path) -> None:
    """Saves a checkpoint completely or not at all, and flushes it to disk.

    Raises:
        OSError: if it cannot be written; ``path`` is then unchanged.
    """
    write_atomically(
        path,
        lambda file: torch.save(dict(state), file),
        partial=f".part-{path.name}",
        fsync=True,
    )
