"""Saves a checkpoint of a fit between two batches, on all ranks together. May import Lightning."""

from __future__ import annotations

import os
from pathlib import Path

from lit_stability.callbacks.last_known_good import LastKnownGood
from lit_stability.lightning_package import Trainer
from lit_stability.trainer_internals import callbacks_of, full_checkpoint
from lit_stability.training_state.good_checkpoints import to_load

PART = ".part-preempted.ckpt"
"""Name of a file, or folder, that is not complete; the next one replaces it."""


def save_at_boundary(trainer: Trainer, path: Path) -> Path:
    """Saves a checkpoint that appears whole or not at all; all ranks call it, between two batches.

    Args:
        trainer: between two batches.
        path: of the checkpoint, the same on all ranks. Several ranks make a folder, without the
            ``.ckpt``, in which each writes what it needs to resume exactly, if there is a
            `LastKnownGood`.

    Returns:
        What Lightning loads.

    Raises:
        OSError: if it cannot be written; nothing is there then under the name.
    """
    keeper = next((c for c in callbacks_of(trainer) if isinstance(c, LastKnownGood)), None)
    folder = path.with_suffix("")
    if keeper is not None and keeper.save_of_ranks(trainer, folder):
        path = folder
    else:
        _save_whole(trainer, keeper, path)
    return to_load(path)


def _save_whole(trainer: Trainer, keeper: LastKnownGood | None, path: Path) -> None:
    part = path.with_name(PART)
    try:
        _write(trainer, keeper, part)
    finally:
        # The others wait here for a rank whose disk is full.
        trainer.strategy.barrier("preemption checkpoint")
    if trainer.is_global_zero:
        _flush(part)
        os.replace(part, path)


def _write(trainer: Trainer, keeper: LastKnownGood | None, part: Path) -> None:
    if trainer.is_global_zero:
        part.parent.mkdir(parents=True, exist_ok=True)
    alone = keeper is not None and trainer.world_size == 1
    checkpoint = keeper.checkpoint(trainer) if keeper and alone else full_checkpoint(trainer)
    trainer.strategy.save_checkpoint(checkpoint, part)
    # An asynchronous plugin returns before the file is there; this waits for it.
    trainer.strategy.checkpoint_io.teardown()


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
