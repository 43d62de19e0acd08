"""Which signals ask a fit to end, and what the program does at them. May import Lightning."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from lit_stability.lightning_package import SLURMEnvironment, Trainer
from lit_stability.trainer_internals.run_folder import local_path

Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
"""What `signal.getsignal` returns; None for a handler that was not installed from Python."""


def handles_signals(trainer: Trainer) -> bool:
    """Returns whether Lightning has installed its handlers, as it does from sanity check to end."""
    return bool(trainer._signal_connector._original_handlers)


def program_handler(trainer: Trainer, signum: int) -> Handler:
    """Returns what handled a signal before Lightning installed its own handlers for this fit.

    Lightning restores it when the fit ends.
    """
    before: dict[Any, Any] = trainer._signal_connector._original_handlers
    return before.get(signal.Signals(signum), signal.getsignal(signum))


def requeue_signal(trainer: Trainer) -> int | None:
    """Returns the signal at which SLURM puts a job back into the queue; None for no signal."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def requeue_checkpoint(trainer: Trainer) -> Path | None:
    """Returns a new path from which Lightning resumes by itself when the job was requeued.

    None if the trainer's ``default_root_dir`` is not on a local file system.
    """
    root = local_path(trainer.default_root_dir)
    if root is None:
        return None
    root.mkdir(parents=True, exist_ok=True)
    return Path(trainer._checkpoint_connector.hpc_save_path(root))


def signal_processes(trainer: Trainer, signum: int) -> None:
    """Passes a signal on to the processes that this one has started for its ranks, if any."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)
