"""`fit_with_recovery`: restarts a fit after exceptions until it finishes or no remedy is left.

May import Lightning.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_stability.lightning_package import LightningDataModule, LightningModule, Trainer
from lit_stability.restart.loop import Recover, Recovery, RecoveryResult
from lit_stability.restart.ranks import RankRecovery
from lit_stability.restart.resume_source import Find, ResumeSource
from lit_stability.restart.torchrun import is_under_torchrun


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
    """Runs ``Trainer.fit``; after an exception, restarts it from the last good checkpoint.

    On one device restarts happen in this process, and before a restart the memory of the failed fit
    is freed. A remedy is chosen by the kind of crash:

    * Out of memory: halves the ``batch_size`` attribute of the module or data module (the attribute
      that Lightning's batch size finder uses) and doubles ``accumulate_grad_batches``, so that each
      optimizer step sees the same samples. Results are equal up to rounding if the loss is a mean
      over micro-batches of equal length and no layer mixes samples. If the batch size cannot be
      halved: calls the module's ``enable_activation_checkpointing()`` or transformers'
      ``gradient_checkpointing_enable()``.
    * Non-finite values, or `TrainingStopped`: halves learning rate and clip, through `AutoRollback`
      if there is one, which raises them again later, otherwise until that fit ends. The second
      time in a row the optimizer state is reset too, the third time the precision is 32.
    * A batch that cannot be fetched: skips every batch of these samples.
    * Any other exception: restarts without a change, but not if the same error recurs at the same
      step.

    Without a good checkpoint and without ``ckpt_path``, a restart begins from the initial states
    of the module and the random generators. After ``max_crashes`` consecutive crashes, or if no
    remedy is left, the original exception is raised with a note that lists what was tried.
    KeyboardInterrupt and SystemExit (and therefore SIGTERM) are never recovered from. Every crash
    is reported in one line on the console and one in ``recoveries.jsonl`` in the folder of the
    first fit. Without a logger all fits share that folder.

    A fit that resumes a checkpoint written with a halved batch size uses the halved batch size.

    On several ranks the program is started by ``torchrun --max-restarts=3``. A rank that crashes
    writes its crash, and what to change, to ``recovery-RUN/attempt=K/rank=R.json`` in the trainer's
    ``default_root_dir``, which all ranks must share, and raises the exception. Its process ends
    within 30 seconds, torchrun ends the others and starts all again, and in these this function
    resumes from the last good checkpoint, with what the rank that crashed first has chosen. A
    process that was killed has written nothing: the run is then resumed as it was. Restarts are
    limited by torchrun too. ``make_trainer()`` is called once more before a restart that changes
    options of the Trainer.

    >>> def train(make_trainer, model, datamodule):  # make_trainer(**options) returns a Trainer
    ...     return fit_with_recovery(make_trainer, model, datamodule, max_crashes=5).trainer

    Args:
        make_trainer: called as ``make_trainer(**overrides)`` for each fit, with Trainer options
            that override its own (none for the first fit). Returns a new Trainer with new
            callbacks, such as ``lambda **overrides: Trainer(**{**options, **overrides},
            callbacks=stability_callbacks())``.
        model: the module to train. A copy of its initial state is kept in host memory. Attributes
            that no checkpoint contains are unchanged by a restart, and so is a halved
            ``batch_size``.
        datamodule: the data module, or None.
        train_dataloaders: as for ``Trainer.fit``; their batch size cannot be halved.
        val_dataloaders: as for ``Trainer.fit``.
        ckpt_path: checkpoint that the first fit resumes from.
        max_crashes: number of consecutive crashes that are recovered from.
        progress_steps: optimizer steps past the furthest crash after which the count of
            consecutive crashes starts again at zero.
        find: finds the last good checkpoint in the folder of a fit; by default `find_last_good`,
            which finds those of `LastKnownGood`.

    Returns:
        The trainer of the fit that finished, with the crashes and remedies before it.

    Raises:
        ValueError: if an option is out of range, or ``make_trainer`` does not work as described.
        TypeError: if ``datamodule`` is something else, such as a loader.
        RuntimeError: if the trainer has several devices, and torchrun has not started them; after
            a restart, if the run before has found no remedy.
    """
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise TypeError(
            f"datamodule must be a LightningDataModule, got {type(datamodule).__name__}; "
            "pass loaders as train_dataloaders="
        )
    limits = Recover(max_crashes=max_crashes, progress_steps=progress_steps)
    data = {
        "datamodule": datamodule,
        "train_dataloaders": train_dataloaders,
        "val_dataloaders": val_dataloaders,
    }
    sources = ResumeSource(find, ckpt_path)
    recovery = RankRecovery if is_under_torchrun() else Recovery
    return recovery(make_trainer, model, data, limits, sources).run()
