"""Writes checkpoints in the background, completely or not at all.

May import torch, but not Lightning.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from lit_stability.lightning_choice import suite_logger
from lit_stability.training_state.atomic_write import write_atomically
from lit_stability.training_state.good_checkpoints import free_path, good_files, step_of
from lit_stability.training_state.host_copy import first_nonfinite

log = suite_logger()

_JOIN_TIMEOUT = 600.0
"""Seconds to wait at the end of a fit for a write: the disk may have failed."""


class AsyncCheckpointWriter:
    """Writes one checkpoint at a time in a background thread that ends with the write.

    A file gets its final name only when it is complete and on disk; if a file of that step exists,
    the name gets a suffix. A failed write is reported once, and training continues.

    Args:
        folder: where to write; created with the first file.
        keep: number of files to keep, the newest by step. Files of later steps, which a run that
            got further has left there, are unchanged.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.newest: Path | None = None
        """The last file written."""
        self._thread: threading.Thread | None = None
        self._failure_reported = False

    @property
    def busy(self) -> bool:
        """Returns whether a checkpoint is being written; its tensors must not change then."""
        return self._thread is not None and self._thread.is_alive()

    def write(
        self, state: Mapping[str, Any], step: int, *, constants: Collection[str] = ()
    ) -> None:
        """Starts to write a checkpoint.

        Args:
            state: the checkpoint; must not change while the writer is `busy`.
            step: the step at which it was captured.
            constants: names of buffers that are non-finite on purpose.
        """
        assert not self.busy, "another checkpoint is being written"
        self._thread = threading.Thread(
            target=self._run, args=(state, step, constants), name="last known good", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Waits for the current write to finish, for ten minutes at most."""
        if self._thread is None:
            return
        self._thread.join(_JOIN_TIMEOUT)
        if self._thread.is_alive():
            log.warning(
                "a checkpoint write to %s has not finished in ten minutes; no longer waiting",
                self.folder,
            )

    def _run(self, state: Mapping[str, Any], step: int, constants: Collection[str]) -> None:
        started = time.perf_counter()
        try:
            bad = first_nonfinite(state, constants)
            if bad is not None:
                log.warning("no good checkpoint written at step %d: %s is non-finite", step, bad)
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            path = free_path(self.folder, step)
            write_whole(state, path)
            self.newest = path
            self._prune(step)
            seconds = time.perf_counter() - started
            log.debug("%s written in %.2f s", path, seconds)
        except Exception as error:
            # A full disk or an object that cannot be pickled must not end the run.
            if not self._failure_reported:
                log.warning(
                    "the good checkpoint of step %d was not written to %s (%s); training "
                    "continues, later failures are not reported",
                    *(step, self.folder, error),
                )
            self._failure_reported = True

    def _prune(self, step: int) -> None:
        older = [f for f in good_files(self.folder) if step_of(f) <= step]
        for file in older[: -self.keep]:
            file.unlink(missing_ok=True)


def write_whole(state: Mapping[str, Any], path: Path) -> None:
    """Saves a checkpoint completely or not at all, and flushes it to disk.

    Only the user may read it: hyperparameters may hold secrets.

    Raises:
        OSError: if it cannot be written; ``path`` is then unchanged.
    """
    write_atomically(
        path,
        lambda file: torch.save(dict(state), file),
        partial=f".part-{path.name}",
        fsync=True,
        private=True,
    )
