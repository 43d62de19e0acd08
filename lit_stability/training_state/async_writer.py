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
from lit_stability.training_state.atomic_write import why_not_written, write_atomically
from lit_stability.training_state.good_checkpoints import free_path, prune
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
        logs: whether to log what cannot be written.
    """

    def __init__(self, folder: Path, keep: int, *, logs: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self._logs = logs
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
            self._write_good(state, step, constants)
            seconds = time.perf_counter() - started
            log.debug("the good checkpoint of step %d took %.2f s", step, seconds)
        except NonFiniteStateError as error:
            if self._logs:
                log.warning("no good checkpoint written at step %d: %s", step, error)
        except Exception as error:
            # A full disk or an object that cannot be pickled must not end the run.
            if self._logs and not self._failure_reported:
                log.warning(
                    "the good checkpoint of step %d was not written to %s (%s); training "
                    "continues, later failures are not reported",
                    *(step, self.folder, why_not_written(error)),
                )
            self._failure_reported = True

    def _write_good(self, state: Mapping[str, Any], step: int, constants: Collection[str]) -> None:
        """Writes the checkpoint if it is finite.

        Raises:
            NonFiniteStateError: if it is not.
            OSError: if it cannot be written.
        """
        require_finite(state, constants)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = free_path(self.folder, step)
        write_whole(state, path)
        self.newest = path
        prune(self.folder, step, self.keep)


class NonFiniteStateError(Exception):
    """Raised if a checkpoint has a NaN or Inf in it, and so is not good."""


def require_finite(state: Mapping[str, Any], constants: Collection[str]) -> None:
    """Checks weights, buffers and optimizer state.

    Raises:
        NonFiniteStateError: if one is not finite; the message has its name.
    """
    bad = first_nonfinite(state, constants)
    if bad is not None:
        raise NonFiniteStateError(f"{bad} is non-finite")


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
