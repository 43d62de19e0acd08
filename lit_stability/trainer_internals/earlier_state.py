"""Has a fit in an earlier state for a while, so that a checkpoint of that state can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lit_stability.lightning_package import Trainer
from lit_stability.trainer_internals.loop_counters import LoopState
from lit_stability.trainer_internals.training_snapshot import TrainingSnapshot


@contextmanager
def in_earlier_state(
    trainer: Trainer, earlier: TrainingSnapshot, present: TrainingSnapshot
) -> Iterator[None]:
    """Restores an earlier state and, at the end of the ``with`` block, the present one.

    The fit may have stopped anywhere, also in the middle of a batch; its gradients stay too.

    Args:
        trainer: at the end of its fit.
        earlier: the state to restore, from before a batch was fetched, in which the optimizers had
            the same groups as now.
        present: captured just now.
    """
    loop = trainer.fit_loop.epoch_loop
    loops, logged_steps = LoopState(trainer), loop._batches_that_stepped
    at_end_of_epoch = loop.batch_progress.is_last_batch
    weights = list(trainer.lightning_module.parameters())
    gradients = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    try:
        loop._batches_that_stepped -= trainer.global_step - earlier.step
        earlier.restore(trainer, replay=False)
        earlier.loops.restore_at_fetch(trainer)
        loop.batch_progress.is_last_batch = False
        yield
    finally:
        present.restore(trainer, replay=False)
        loops.restore_at_fetch(trainer)
        loop._batches_that_stepped = logged_steps
        loop.batch_progress.is_last_batch = at_end_of_epoch
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
