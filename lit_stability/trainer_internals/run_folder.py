"""Where a fit keeps its records and checkpoints, and which run it belongs to."""

from __future__ import annotations

import os
import re
from pathlib import Path
from weakref import WeakKeyDictionary

from lit_stability.lightning_package import CSVLogger, Logger, TensorBoardLogger, Trainer
from lit_stability.outside import tried
from lit_stability.training_state.run_names import RUNS, new_run_name

_SET: WeakKeyDictionary[Trainer, str] = WeakKeyDictionary()
"""Folders that were set by `keep_records_in`."""
_BELOW: WeakKeyDictionary[Trainer, str] = WeakKeyDictionary()
"""Folders below which each run has a new one, that were set by `keep_runs_below`."""
_NEW: WeakKeyDictionary[Trainer, str] = WeakKeyDictionary()
"""Folders that were made up, for Trainers without a logger."""


def run_directory(trainer: Trainer) -> Path | None:
    """Returns the folder of a run for records and checkpoints; None if there is none.

    With a logger it is the one in which ModelCheckpoint has its ``checkpoints``:
    ``save_dir/name/version`` of the first logger, or ``default_root_dir/name/version`` if that has
    no ``save_dir``. Without one it is a new folder ``stability/<time>-<number>`` in
    ``default_root_dir``, so that no two runs share one; a fit that resumes from a checkpoint in
    such a folder goes on there.

    To be called on all ranks or none, from ``setup`` on: before that, loggers may have no version.
    All ranks get the folder of rank 0.
    """
    return _resolve(trainer)[0]


def why_no_directory(trainer: Trainer) -> str | None:
    """Returns why a fit writes no record and no checkpoint of its own, or None.

    Nobody expects files in the working directory from a Trainer that has neither a logger nor a
    checkpoint callback, and was given no folder. To be called on all ranks or none.
    """
    return _resolve(trainer)[1]


def keep_records_in(trainer: Trainer, folder: str | os.PathLike[str]) -> None:
    """Sets the folder of a run without a logger, which else is new for each Trainer.

    Args:
        trainer: before its fit; the same folder must be set on all ranks.
        folder: need not exist yet.
    """
    _SET[trainer] = os.fspath(folder)


def keep_runs_below(trainer: Trainer, folder: str | os.PathLike[str]) -> None:
    """Sets the folder below which each run has a new one, also where there is a logger.

    Args:
        trainer: before its fit; the same folder must be set on all ranks.
        folder: need not exist yet.
    """
    _BELOW[trainer] = os.path.abspath(os.fspath(folder))


def run_id(trainer: Trainer, saved: str | None) -> str:
    """Returns the id of the run that a fit belongs to, the same on all ranks.

    Args:
        trainer: in its fit. To be called on all ranks or none.
        saved: the id in the checkpoint that was loaded, if any.

    Returns:
        The saved id, if the checkpoint is in the folder of this fit, which then continues that
        run; else a new one. A checkpoint of another folder is only the start of another run.
    """
    folder, checkpoint = run_directory(trainer), local_path(trainer.ckpt_path)
    continued = folder and checkpoint and checkpoint.resolve().is_relative_to(folder.resolve())
    if saved and continued:
        own = saved
    elif folder is not None and folder.parent.name == RUNS:
        own = folder.name
    else:
        own = new_run_name()
    agreed: str = trainer.strategy.broadcast(own)
    return agreed


def local_path(path: str | os.PathLike[str] | None) -> Path | None:
    """Returns the path of a local file or folder; None for one on ``s3://`` or ``memory://``.

    >>> local_path("file:///runs/a"), local_path("s3://bucket/a"), local_path("runs/a")
    (PosixPath('/runs/a'), None, PosixPath('runs/a'))
    """
    # Lightning normalizes file:///runs to file:/runs.
    text = "" if path is None else re.sub("^file:/+", "/", os.fspath(path))
    return Path(text) if text and "://" not in text else None


def _resolve(trainer: Trainer) -> tuple[Path | None, str | None]:
    """Returns the folder, or why there is none."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None, "it is a fast_dev_run"
    root, folder, given = trainer.strategy.broadcast(_of_this_rank(trainer))
    if local_path(root) is None:
        return None, f"{root} is not on a local file system"
    if not given and not trainer.checkpoint_callbacks and root == os.getcwd():
        missing = "the Trainer has no logger,"
        if trainer.loggers:
            missing = "the logger has no save_dir, and the Trainer"
        return None, f"{missing} no checkpoint callback and no default_root_dir"
    return local_path(folder), None


def _of_this_rank(trainer: Trainer) -> tuple[str, str, bool]:
    """Returns the folder of all runs, that of this run, and whether a logger or caller gave it."""
    root = str(trainer.default_root_dir)
    if trainer in _BELOW:
        root = _BELOW[trainer]
        return root, _new_folder_of(trainer, root), True
    if not trainer.loggers and trainer in _SET:
        folder = _SET[trainer]
        return folder, folder, True
    if trainer.loggers:
        # A logger may ask a server for its name; without an answer the folder is as without it.
        found, _ = tried(lambda: _of_logger(trainer.loggers[0], root))
        if found is not None:
            return found
    return root, _new_folder_of(trainer, root), False


def _of_logger(logger: Logger, root: str) -> tuple[str, str, bool]:
    """Returns what ModelCheckpoint takes, except that event files may have a ``sub_dir``."""
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return str(logger.save_dir), str(logger.log_dir), True
    save_dir, version = logger.save_dir, logger.version
    version = version if isinstance(version, str) else f"version_{version}"
    base = root if save_dir is None else str(save_dir)
    return base, os.path.join(base, str(logger.name), version), save_dir is not None


def _new_folder_of(trainer: Trainer, root: str) -> str:
    if trainer not in _NEW:
        _NEW[trainer] = _new_folder(root, local_path(trainer.ckpt_path))
    return _NEW[trainer]


def _new_folder(root: str, checkpoint: Path | None) -> str:
    """Returns a new folder; or that of the run below ``root`` whose checkpoint is resumed."""
    base = os.path.join(root, RUNS)
    local = local_path(base)
    if checkpoint is not None and local is not None:
        known, _ = tried(lambda: checkpoint.resolve().relative_to(local.resolve()))
        if known is not None and len(known.parts) > 1:
            return os.path.join(base, known.parts[0])
    return os.path.join(base, new_run_name())
