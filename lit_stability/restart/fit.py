"""`fit_with_recovery`: fits again and again until one comes through, or none can.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lit_stability.restart.loop import Recover, Recovery, RecoveryResult
from lit_stability.restart.resume_source import Find, ResumeSource


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

    A checkpoint of a fit whose batches had been halved is gone on from with batches as small.

    Args:
        make_trainer: called as ``make_trainer(**overrides)`` for each fit, with options of the
            Trainer that override its own, none at first; returns a Trainer that is new, with new
            callbacks, such as ``lambda **overrides: Trainer(**{**options, **overrides},
            callbacks=stability_callbacks())``.
        model: in training; a copy of its initial state is kept in host memory. Attributes of its
            own that no checkpoint holds are left as they are, a halved ``batch_size`` too.
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
    sources = ResumeSource(find, ckpt_path)
    return Recovery(make_trainer, model, data, limits, sources).run()
