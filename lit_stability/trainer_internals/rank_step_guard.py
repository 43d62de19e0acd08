"""The guard of ``training_step`` on several ranks, which decide together how a fit goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS

from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.step_exceptions import may_come_from_numbers
from lit_stability.trainer_internals.step_guard import (
    StepFailure,
    StepGuard,
    can_substitute,
    guard_of,
)
from lit_stability.trainer_internals.strategies import sharing
from lit_stability.training_state.out_of_memory import forget_locals, is_out_of_memory

SECONDHAND = "raised on rank {rank}: "
"""How the message begins that the other ranks raise."""


def can_guard_ranks(trainer: Trainer) -> bool:
    """Returns whether a rank whose ``training_step`` raises can spare the others from waiting.

    It can if the ranks exchange nothing before the backward pass, and the same in each one. So not
    with FSDP2, with SyncBatchNorm, with sparse gradients or a static graph; and not in manual
    optimization or with LBFGS, where the ranks do not know that a backward pass is the last one.
    """
    module, wrapper = trainer.lightning_module, trainer.strategy.model
    return (
        sharing(trainer) == "replicas"
        and module.automatic_optimization
        and not any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers)
        and type(wrapper) is DistributedDataParallel
        and not wrapper.static_graph
        and not any(
            isinstance(each, nn.SyncBatchNorm) or getattr(each, "sparse", False) is True
            for each in module.modules()
        )
    )


class RankStepGuard(StepGuard):
    """Catches an exception inside the forward pass of DDP, and has all ranks decide on it.

    The exception becomes a loss of 0 before DDP sees it, so this rank takes part in the sums of the
    backward pass like the others, with gradients of 0, and nobody waits. The vector that is summed
    in each step tells all ranks who failed; then `agree` decides. A lack of memory is caught too: a
    fit on one rank can be started again at once, that of many ranks only with all processes.

    Nothing is caught before one ``training_step`` has shown that it exchanges nothing with other
    ranks, nor after one that did, as with ``self.log(..., sync_dist=True)``: they would wait there.

    Args:
        trainer: in its fit, where `can_guard_ranks`.
        pl_module: the module in training.
        contain: called on all ranks with the failure of a step; returns whether the fit goes on.
        passed: called after each ``training_step`` of this rank that worked.
        prepare: called with each failure of this rank, before its batch is forgotten; returns
            whether it can be handled. If not, the exception is raised on this rank alone.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        contain: Callable[[StepFailure], bool],
        passed: Callable[[], None],
        prepare: Callable[[StepFailure], bool],
    ) -> None:
        super().__init__(trainer, pl_module, contain, passed)
        self._prepare = prepare
        self._error: Exception | None = None
        """What was raised on this rank in the current step."""
        self._has_passed = False
        """Whether a ``training_step`` has worked, which shows what it exchanges."""
        self._communicates = False
        """Whether a ``training_step`` has called a collective, or may have."""

    def _attempt(
        self, trainer: Trainer, run: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        module = trainer.lightning_module

        def guarded(*args: Any, **kwargs: Any) -> Any:
            # Before the call: the patch below may remove itself in it, and must find itself on top.
            within.remove()
            step = self._heard(module.training_step)
            return super(RankStepGuard, self)._attempt(trainer, step, *args, **kwargs)

        within = Patch(module, "training_step", guarded)
        within.apply()
        try:
            return run(*args, **kwargs)
        finally:
            within.remove()

    def _heard(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the step, which notes whether it called a collective."""

        def heard(*args: Any, **kwargs: Any) -> Any:
            before = _collectives()
            try:
                output = step(*args, **kwargs)
            finally:
                after = _collectives()
                self._communicates = self._communicates or before is None or before != after
            self._has_passed = True
            return output

        return heard

    def _may_be_handled(self, error: Exception) -> bool:
        known = may_come_from_numbers(error) or is_out_of_memory(error)
        return known and self._has_passed and not self._communicates

    def _contains(self, trainer: Trainer, failure: StepFailure, error: Exception | None) -> bool:
        if self._communicates or not can_substitute(trainer.lightning_module):
            return False
        if not self._prepare(failure):
            return False
        failure.batch, self._failed = None, True
        if error is not None:
            # Its frames hold the activations.
            forget_locals(error)
            gc.collect()
        if self.failure is None:
            self.failure, self._error = failure, error
        else:
            self.failure.batches += failure.batches
        return True

    def agree(self, gather: Callable[[Any], list[Any]]) -> StepFailure:
        """Decides with the other ranks, in a step in which some have failed.

        Args:
            gather: returns the value of each rank.

        Returns:
            The failure for which all ranks reject the step.

        Raises:
            Exception: that of this rank, if the fit does not go on; on the others one that names
                it, of the same kind as far as recovery is concerned.
        """
        own = None if self._error is None else is_out_of_memory(self._error)
        reports = gather((self.failure, own))
        failure = failure_of_ranks([report for report, _ in reports])
        if all(gather(self._contain(failure))):
            self.failure, self._error = failure, None
            return failure
        if self.failure is not None:
            raise self._error or RuntimeError(self.failure.error)
        first = failure.ranks[0]
        text = f"{SECONDHAND.format(rank=first)}{failure.error}"
        raise torch.OutOfMemoryError(text) if reports[first][1] else RuntimeError(text)


def failure_of_ranks(reports: Sequence[StepFailure | None]) -> StepFailure:
    """Returns one failure for those of several ranks: what the first one raised, where any found.

    >>> a = StepFailure("ValueError: x", "f.py:3 in f", None, batches=((0, 4),))
    >>> failure = failure_of_ranks([None, a])
    >>> failure.ranks, failure.error, failure.batches
    ((1,), 'ValueError: x', ((0, 4),))
    """
    failed = {rank: each for rank, each in enumerate(reports) if each is not None}
    first, *_ = failed.values()
    batches = {batch for each in failed.values() for batch in each.batches}
    return replace(
        first,
        ranks=tuple(failed),
        batches=tuple(sorted(batches)),
        findings=_each_once(each.findings for each in failed.values()),
        bad_batch=any(each.bad_batch for each in failed.values()),
        bad_weights=_each_once(each.bad_weights for each in failed.values()),
        bad_buffers=_each_once(each.bad_buffers for each in failed.values()),
    )


def agreed_failure(trainer: Trainer, gather: Callable[[Any], list[Any]]) -> StepFailure:
    """Returns the failure for which all ranks reject the step; see `RankStepGuard.agree`."""
    guard = guard_of(trainer)
    assert isinstance(guard, RankStepGuard)
    return guard.agree(gather)


def _each_once(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for group in groups for text in group))


def _collectives() -> int | None:
    """Returns how many collectives the group of all ranks has run; None if it does not tell."""
    try:
        return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[union-attr]
    except RuntimeError:
        return None
