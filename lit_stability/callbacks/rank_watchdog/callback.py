"""`RankWatchdog`: names the rank that keeps the others waiting, and ends the fit on all of them."""

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.callbacks.gradient_monitor.validation import require_package
from lit_stability.callbacks.hooks import StabilityCallback, hide_hooks, show_hooks
from lit_stability.callbacks.rank_watchdog.report import EXIT_CODE, HangReport
from lit_stability.callbacks.rank_watchdog.watch import Limits, RankWatch, TrainerView
from lit_stability.callbacks.requirements import run_of
from lit_stability.detectors.anomaly import require
from lit_stability.distributed.heartbeat import (
    BACKWARD,
    CHECKPOINT,
    DATA,
    END,
    EPOCH_END,
    OPTIMIZER,
    START,
    VALIDATION,
)
from lit_stability.distributed.heartbeat_exchange import meet
from lit_stability.distributed.heartbeat_stragglers import Straggler, StragglerWatch
from lit_stability.distributed.heartbeat_verdict import describe_over
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.redaction import redacted
from lit_stability.trainer_internals import (
    adapter_of,
    at_worker_exit,
    is_called,
    patch_save_checkpoint,
    run_directory,
    sharing,
)

log = suite_logger()


class RankWatchdog(StabilityCallback):
    """Ends a fit on several ranks that would otherwise hang, and names the rank that is the reason.

    Every rank publishes once a second where it is: its phase, batch and step. A rank whose training
    does not get on looks at the others. It finds

    * a rank whose process is gone: at once on the same machine, or when it was rank 0; on another
      machine after ``silent_after``;
    * a rank that has raised an exception: within seconds;
    * a rank that sends nothing any more, because its process is stopped or code outside of Python
      holds the interpreter: after ``silent_after``;
    * a rank that has left the training loop, as its data had fewer batches: after ``timeout``;
    * a rank that is behind the others, as its loader or its code does not return: after
      ``timeout``. Where all ranks are in the same place, none is named.

    While another rank is gone or has raised, a rank still has 5 seconds to get on where it waits
    for others, 60 where it may be at work of its own, and its usual time in a validation or while a
    checkpoint is saved; it often raises an exception of its own by then, since its connection is
    broken, and the log then has the rank that was the first.

    Then every rank appends the Python stacks of all its threads to ``hang-<time>.txt`` in
    the folder of the run, with a header; the lowest living rank logs one line and adds a row to
    ``incidents.jsonl``; all ranks end with exit code 75, without any clean-up, so that torchrun or
    the scheduler can start them again. A rank that sends nothing and is on the same machine is
    killed.

    The times are minutes by default, because a rank that is slow once must not be taken for one
    that hangs. They are longer where work may take long: ``slow_factor`` times before the first
    batch and in the first two, while ``torch.compile`` compiles, in each batch of a validation,
    while a checkpoint is saved, and at the end of an epoch. A phase may also last ``slow_factor``
    times longer than it ever did. Time in which a job was suspended as a whole does not count. Make
    ``timeout`` longer for steps of more than ten minutes, or to stop one rank with a debugger. A
    ``timeout`` of the strategy that is above its default of 30 minutes counts as well.

    A slow rank is reported once, by rank 0: one that spends so much more time than the median of
    the others, between batches or in its forward pass, that each batch takes ``straggler_factor``
    times longer, over ``straggler_steps`` batches. Not seen are a slow backward pass or optimizer,
    in which ranks wait for each other; with sharded weights a slow forward pass; and a slow GPU
    that runs behind its host.

    Not seen either: what happens before ``on_fit_start`` and outside of ``Trainer.fit``; a
    collective in which a GPU waits, before the host waits for it.

    The training thread writes a few Python attributes in four hooks per step, 1500 ns on one core
    of a server, and Lightning calls them; two other threads do the rest. On one device there are no
    hooks, no threads and no store.

    >>> from lit_stability import stability_callbacks
    >>> suite = stability_callbacks(watchdog=dict(timeout=1800.0))

    Args:
        timeout: seconds for which a rank may stay in one place.
        silent_after: seconds without a heartbeat after which a rank counts as stopped.
        slow_factor: multiplies both where work may take long.
        straggler_factor: from which on a slow rank is reported; infinity for never.
        straggler_steps: batches for which a rank must be slow.
        interval: seconds between two heartbeats.

    Raises:
        ValueError: if an argument is out of its range.
    """

    ignores_skipped_steps = True

    exit_code = EXIT_CODE
    """Exit code of every rank that the watchdog ends."""

    def __init__(
        self,
        *,
        timeout: float = 600.0,
        silent_after: float = 120.0,
        slow_factor: float = 3.0,
        straggler_factor: float = 1.5,
        straggler_steps: int = 200,
        interval: float = 1.0,
    ) -> None:
        require(timeout > 0, "timeout", timeout, "greater than 0")
        require(interval > 0, "interval", interval, "greater than 0")
        require(slow_factor >= 1, "slow_factor", slow_factor, "at least 1")
        require(straggler_factor > 1, "straggler_factor", straggler_factor, "greater than 1")
        require(straggler_steps >= 1, "straggler_steps", straggler_steps, "at least 1")
        wanted = f"at least 5 times interval, which is {interval!r}"
        require(silent_after >= 5 * interval, "silent_after", silent_after, wanted)
        self.timeout = timeout
        self.silent_after = silent_after
        self.slow_factor = slow_factor
        self.straggler_factor = straggler_factor
        self.straggler_steps = straggler_steps
        self.interval = interval
        self._watch: RankWatch | None = None
        self._undo: list[Callable[[], None]] = []

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_watch": None, "_undo": []}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the watch of a fit that had no regular end."""
        require_package(trainer, self)
        if stage == "fit":
            self._release()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to watch, if there are several ranks."""
        self._release()
        if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            hide_hooks(self)
            self._undo.append(lambda: show_hooks(self))
            return
        directory, name = run_directory(trainer), time.strftime("hang-%Y%m%d-%H%M%S.txt")
        meeting = meet(name)
        file = None if directory is None else directory / meeting.shared
        report = HangReport(file, lambda: run_of(trainer))
        forward_waits = sharing(trainer) != "replicas"
        stragglers = StragglerWatch(
            self.straggler_factor, self.straggler_steps, forward_waits=forward_waits
        )
        self._watch = RankWatch(
            meeting,
            Limits(
                max(self.timeout, adapter_of(trainer).longest_wait),
                self.silent_after,
                self.slow_factor,
                self.interval,
            ),
            self._view(trainer),
            stragglers if trainer.is_global_zero else None,
            _report_straggler,
            report,
        )
        self._undo.append(patch_save_checkpoint(trainer, self._saving))
        self._undo.append(at_worker_exit(lambda: self._worker_ended(trainer, pl_module)))
        self._watch.start()

    def _worker_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the watch in a worker that failed, for which Lightning calls no hook."""
        self.on_exception(trainer, pl_module, RuntimeError("the worker process ended"))
        self._release()

    def _view(self, trainer: Trainer) -> TrainerView:
        return TrainerView(
            step=lambda: trainer.global_step,
            searching=lambda: not is_called(trainer, self),
            interrupted=lambda: trainer.interrupted,
            over=lambda: trainer.state.stage is None or not trainer.interrupted,
        )

    def _saving(self, save: Callable[[], Any]) -> Any:
        """Saves a checkpoint, for whoever asked the Trainer for it."""
        if self._watch is None:
            return save()
        heart = self._watch.heart
        before, events = heart.phase, heart.events
        heart.enter(CHECKPOINT)
        # Not progress that others can be compared with: a program may save on one rank alone.
        heart.events = events
        try:
            return save()
        finally:
            heart.enter(before)
            heart.events = events

    def _enter(self, phase: int) -> None:
        if self._watch is not None:
            self._watch.heart.enter(phase)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters the wait for the first batch."""
        self._enter(DATA)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts as progress."""
        self._enter(DATA)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enters the forward pass."""
        if self._watch is not None:
            self._watch.heart.begin_batch()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Enters the backward pass."""
        if self._watch is not None:
            self._watch.heart.enter(BACKWARD)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Enters the optimizer's step."""
        if self._watch is not None:
            self._watch.heart.enter(OPTIMIZER)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Enters what lies between two batches."""
        if self._watch is not None:
            self._watch.heart.enter(DATA)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters a validation."""
        self._enter(VALIDATION)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts as progress: the time is that of one batch."""
        self._enter(VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves a validation."""
        self._enter(START if trainer.sanity_checking else DATA)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters the end of an epoch, and of the training: callbacks may work for long there."""
        self._enter(EPOCH_END)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the training loop."""
        self._enter(END)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Publishes the exception; logs which other rank was the first, if one was."""
        self._remove_patches()
        watch = self._watch
        if watch is None or watch.heart.state != "running":
            return
        kind = type(exception).__name__
        first_line = redacted(str(exception)).split("\n")[0][:300]
        ranks = watch.raised(f"{kind}: {first_line}")
        ended = [
            describe_over(rank, seen)
            for rank, seen in ranks.items()
            if rank != watch.meeting.rank
            and (seen.gone or seen.beat.state == "raised")
            and not seen.beat.message.startswith(f"{kind}:")
        ]
        if ended:
            log.error(
                "rank %d ends with %s; probably because %s",
                watch.meeting.rank,
                kind,
                "; ".join(ended),
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the watch, when all ranks have left their loops."""
        if stage != "fit":
            return
        if self._watch is not None:
            self._watch.ended()
        self._release()

    def _release(self) -> None:
        """Ends the threads and removes the patches, if there are any."""
        if self._watch is not None:
            self._watch.stop()
        self._watch = None
        self._remove_patches()

    def _remove_patches(self) -> None:
        while self._undo:
            self._undo.pop()()


def _report_straggler(found: Straggler) -> None:
    log.warning(
        "rank %d is slow: %s takes it %.3g s a batch, the other ranks %.3g s; each batch takes "
        "%.2g times longer by that",
        found.rank,
        "what lies between two batches (data)" if found.phase == "data" else "the forward pass",
        found.own,
        found.others,
        found.factor,
    )
