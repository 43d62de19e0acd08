"""`PreemptionCheckpoint`: saves a checkpoint when a scheduler asks the run to end."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.preemption_checkpoint.requeue import requeue
from lit_stability.callbacks.preemption_checkpoint.save import save_at_boundary
from lit_stability.callbacks.preemption_checkpoint.signal_flag import (
    SignalFlag,
    exit_code,
    is_free,
)
from lit_stability.callbacks.requirements import require_monitor, shares_numbers
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, SIGTERMException, Trainer
from lit_stability.outside import guarded
from lit_stability.trainer_internals import (
    BetweenBatches,
    ends_window,
    handles_signals,
    program_handler,
    requeue_checkpoint,
    requeue_signal,
    run_directory,
    signal_processes,
)
from lit_stability.training_state.good_checkpoints import free_path, put_aside
from lit_stability.training_state.preemption_checkpoints import FOLDER

log = suite_logger()


class PreemptionCheckpoint(StabilityCallback):
    """Saves a checkpoint and ends the run when a scheduler sends SIGTERM or SIGUSR1.

    A signal may come at any moment, to one rank or to all. Its handler only notes it. The note
    travels with the statistics of the next optimizer step, so all ranks learn of it in the same
    step, and all act after it, before the next batch is fetched: they save one checkpoint, log its
    path, and raise Lightning's ``SIGTERMException`` with the exit code 128 + signal (143 for
    SIGTERM, 138 for SIGUSR1), so ``on_exception`` of every callback runs and every rank ends with
    that code. Lightning's own handlers, which save and broadcast wherever the signal interrupts the
    program, are replaced for the fit; when it ends Lightning restores those of the program.

    The checkpoint is ``preempted/step=<step>.ckpt`` in the folder of the run. It appears under this
    name when it is complete. ``Trainer.fit(ckpt_path=find_resume_checkpoint(folder))`` goes on from
    it; with a `LastKnownGood` bit for bit, and otherwise as from a checkpoint of Lightning in the
    middle of an epoch. With a `LastKnownGood` several ranks write a folder, as it does.

    Under SLURM with ``SLURMEnvironment(auto_requeue=True)``, the default, its requeue signal
    (SIGUSR1; ``#SBATCH --signal=SIGUSR1@90``) adds the link ``hpc_ckpt_<n>.ckpt`` to
    ``default_root_dir``, by which Lightning resumes from the checkpoint by itself, and runs
    ``scontrol requeue JOB``. If that fails it is logged, and the run ends all the same. SIGTERM
    never requeues: it may be ``scancel``, and where SLURM preempts by requeueing it does so itself.

    A step ends with the optimizer's step: a signal in the first batch of an accumulation window is
    acted upon at the end of the window, one in a validation after it. If no step ends within
    ``grace`` seconds, as in a long validation or where a rank is gone, nothing is saved: that is
    logged, the fit ends with the same exception, and the last known good checkpoint is what is
    left. Where the program is inside a call that no exception interrupts, the process ends 10
    seconds later. A signal that comes after the last step ends the process after the fit.

    Where the signal ends the workers of a data loader too, that does not interrupt the step. A
    handler of the program for SIGTERM is called as well, when the signal comes. One for SIGUSR1,
    such as that of ``faulthandler.register``, is left in place, and this callback does not react to
    that signal. Nothing is installed, and it is logged, where the fit is not in the main thread,
    has no local folder, or runs on several ranks under a strategy that is not supported;
    Lightning's own handlers stay then.

    >>> from lit_stability import stability_callbacks
    >>> suite = stability_callbacks(preemption=dict(grace=60.0))

    Args:
        grace: seconds from the signal to the end of a step. torchrun kills 30 s after SIGTERM,
            SLURM after ``KillWait`` (30 s) or the time in ``--signal``; a save takes time as well.

    Raises:
        ValueError: if ``grace`` is not positive; at ``setup`` without a `GradientMonitor` before.
    """

    def __init__(self, *, grace: float = 30.0) -> None:
        if not grace > 0:
            raise ValueError(f"grace must be a positive number of seconds, got {grace!r}")
        self.grace = grace
        self._fit: _Fit | None = None

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_fit": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the order of the callbacks.

        Raises:
            ValueError: without a `GradientMonitor` before it.
        """
        if stage == "fit":
            require_monitor(trainer, self)
            self._release()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replaces Lightning's handlers, which it has installed just before."""
        self._begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replaces Lightning's handlers, and begins to act between two batches."""
        self._begin(trainer)
        if self._fit is not None:
            self._fit.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follows the loaders, which may have been reloaded."""
        if self._fit is not None:
            self._fit.boundary.attach()

    def _begin(self, trainer: Trainer) -> None:
        if self._fit is None and handles_signals(trainer):
            self._fit = _Fit(self, trainer)

    def rank_flag(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Returns the signal that this rank has received, or 0."""
        return 0.0 if self._fit is None else float(self._fit.received)

    def on_rank_flags(
        self, trainer: Trainer, pl_module: LightningModule, flags: Sequence[float]
    ) -> None:
        """Takes over a signal that any rank has received."""
        if self._fit is not None and any(flags):
            self._fit.agree([int(flag) for flag in flags])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stops the clock; the handlers are restored by Lightning."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the process if a signal came after the last step.

        Raises:
            SIGTERMException: in that case; the fit is complete then.
        """
        if stage != "fit":
            return
        signum = 0 if self._fit is None else self._fit.pending
        self._release()
        if signum:
            log.warning("%s came in the last step: the fit is complete", _name(signum))
            raise ending(signum)

    def _release(self) -> None:
        if self._fit is not None:
            self._fit.close()
        self._fit = None


class _Fit:
    """The signals of one fit, and what is done about them."""

    def __init__(self, owner: PreemptionCheckpoint, trainer: Trainer) -> None:
        self._owner, self._trainer = owner, trainer
        # All ranks call it: the folder of a logger is that of rank 0.
        self._directory = run_directory(trainer)
        self._requeue_signal = requeue_signal(trainer)
        self._agreed = 0
        self._alone = trainer.world_size == 1
        self._signals: SignalFlag | None = None
        self.boundary = BetweenBatches(trainer, owner, self._between_batches, self._fetch_failed)
        reason = self._why_not()
        if reason is None:
            self._signals = SignalFlag(self._handlers(), owner.grace, self._too_late, ending)
            self._signals.install()
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("PreemptionCheckpoint leaves SIGTERM to Lightning: %s", reason)

    def _why_not(self) -> str | None:
        """Returns the reason for installing no handler, or None."""
        if self._directory is None:
            # The reason is in the log already, of `LastKnownGood`.
            return "there is no folder for a checkpoint"
        if not shares_numbers(self._trainer):
            return f"ranks do not exchange signals under {type(self._trainer.strategy).__name__}"
        if threading.current_thread() is not threading.main_thread():
            return "the fit is not in the main thread, and only there Python handles signals"
        return None if hasattr(signal, "pthread_kill") else "the system has no POSIX signals"

    def _handlers(self) -> dict[int, Any]:
        own = program_handler(self._trainer, signal.SIGTERM)
        found = {int(signal.SIGTERM): own if callable(own) else None}
        for signum in {int(signal.SIGUSR1), self._requeue_signal or int(signal.SIGUSR1)}:
            now = signal.getsignal(signum)
            replaced_by_lightning = now != program_handler(self._trainer, signum)
            if replaced_by_lightning or is_free(signum, now):
                found.setdefault(signum, None)
        return found

    def start(self) -> None:
        """Begins to act between batches; moves checkpoints of another run in the folder away."""
        self.boundary.attach()
        folder = None if self._directory is None else self._directory / FOLDER
        if folder is None or self._trainer.ckpt_path or not self._trainer.is_global_zero:
            return
        try:
            moved_to = put_aside(folder)
        except OSError as error:
            log.warning("checkpoints of another run in %s cannot be moved: %s", folder, error)
        else:
            if moved_to is not None:
                log.info("preemption checkpoints of another run were moved to %s", moved_to)

    @property
    def received(self) -> int:
        """The signal that this process has received, or 0."""
        return 0 if self._signals is None else self._signals.received

    @property
    def pending(self) -> int:
        """The signal to act upon, or 0."""
        return self._agreed or self.received

    def agree(self, flags: Sequence[int]) -> None:
        """Takes over a signal of the ranks; one that requeues comes before one that does not."""
        self._agreed = next((f for f in flags if f == self._requeue_signal), max(flags))

    def _between_batches(self) -> None:
        signum = self.received if self._alone else self._agreed
        if signum and ends_window(self._trainer):
            self._end(signum)

    def _fetch_failed(self, error: Exception) -> None:
        """Ends the fit if the signal has also ended the workers of the loader."""
        signum = self.received
        if not signum:
            return
        if self._alone and ends_window(self._trainer):
            self._end(signum)
        log.warning(
            "%s: the loader failed before a step ended (%r), nothing is saved; resume from the "
            "last known good checkpoint",
            _name(signum),
            error,
        )
        raise ending(signum) from error

    def _end(self, signum: int) -> NoReturn:
        """Saves, requeues, and ends the fit; on all ranks."""
        if self._signals is not None:
            self._signals.act()
        requeues = signum == self._requeue_signal
        self._save(signum, *self._paths(requeues))
        if requeues and self._trainer.is_global_zero:
            requeue()
        raise ending(signum)

    def _paths(self, requeues: bool) -> tuple[Path, Path | None]:
        assert self._directory is not None
        link = None
        if requeues:
            what = "the name from which Lightning resumes cannot be created"
            link = guarded(self, what, lambda: requeue_checkpoint(self._trainer))
        path = free_path(self._directory / FOLDER, self._trainer.global_step)
        # Each rank looks for free names, and another may already see the file of rank 0.
        return self._trainer.strategy.broadcast((path, link))

    def _save(self, signum: int, path: Path, link: Path | None) -> None:
        step, name = self._trainer.global_step, _name(signum)
        try:
            path = save_at_boundary(self._trainer, path)
        except Exception as error:
            log.warning(
                "%s: the checkpoint of step %d cannot be saved (%r); resume from the last known "
                "good checkpoint",
                name,
                step,
                error,
            )
            return
        if self._trainer.is_global_zero:
            log.warning("%s: saved step %d to %s; the run ends now", name, step, path)
            _link(link, path)

    def _too_late(self, signum: int) -> None:
        log.warning(
            "%s: no step ended within %g s, nothing is saved; resume from the last known good "
            "checkpoint",
            _name(signum),
            self._owner.grace,
        )
        signal_processes(self._trainer, signum)

    def close(self) -> None:
        """Stops the clock, and leaves the loaders as they were."""
        self.boundary.detach()
        if self._signals is not None:
            self._signals.close()


def _link(link: Path | None, path: Path) -> None:
    """Creates the name by which Lightning finds a checkpoint, if there is one."""
    if link is None:
        return
    try:
        link.symlink_to(path.resolve())
    except OSError as error:
        log.warning("%s cannot be created (%s): resume with ckpt_path=%s", link, error, path)


def ending(signum: int) -> SIGTERMException:
    """Returns the exception that ends the fit, and the process with the code of the signal."""
    return SIGTERMException(exit_code(signum))


def _name(signum: int) -> str:
    return signal.Signals(signum).name
