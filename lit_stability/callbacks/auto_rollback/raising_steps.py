"""Decides whether a fit goes on after its ``training_step`` raised an exception.

May import Lightning.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.callbacks.auto_rollback.rollback_engine import RollbackEngine
from lit_stability.incidents import Incident
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import Callback, LightningModule, Trainer
from lit_stability.measurement.number_formats import which_are_finite
from lit_stability.measurement.tensor_tree import named_tensors
from lit_stability.trainer_internals import (
    RankStepGuard,
    StepFailure,
    StepGuard,
    callbacks_of,
    sharing,
)

log = suite_logger()

_IN_A_ROW = 3
"""Fewest batches in a row that raise without an explanation for which the program is at fault."""
_BY_CHANCE = 1e-4
"""Largest probability of a row of bad batches that is held to be no chance."""
_OF_ONE_BATCH = 20
"""Exceptions on one batch before it is raised to the user, whatever was done about them."""
_NAMED = 3
"""Samples that are named in a message."""


class RaisingSteps:
    """Keeps a fit alive when ``training_step`` raises because of its batch or of damaged state.

    The step is rejected like one with a NaN loss. An exception is raised to the user, untouched, if
    no step of this fit has succeeded yet; if it comes with the third batch in a row (later if
    many batches have raised before) although batch, weights and buffers are finite, as the program
    is at fault then; and if the batch cannot be undone. Several ranks decide together, once for
    each step, and all of them raise.

    Args:
        trainer: in its fit, on one rank or where `can_guard_ranks`.
        pl_module: the module in training.
        engine: undoes steps; it must record the batches.
        owner: the callback; nothing is caught while a tuner has replaced it.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        engine: RollbackEngine,
        owner: Callback,
    ) -> None:
        self._trainer, self._module, self._engine = trainer, pl_module, engine
        self._owner = owner
        self._guard: StepGuard
        self._alone = sharing(trainer) == "alone"
        if self._alone:
            self._guard = StepGuard(trainer, pl_module, self._contain_alone, self._passed)
        else:
            self._guard = RankStepGuard(
                trainer, pl_module, self._contain_together, self._passed, self._prepare
            )
        self._passes = 0
        """Batches that passed on this rank since the last step that was accepted or failed."""
        self._unexplained: list[tuple[int, int]] = []
        """Epoch and index of the batches in a row that raised without an explanation."""
        self._good = self._bad = 0
        """Batches that passed, and that raised without an explanation in earlier rows."""
        self._count: Counter[tuple[int, int]] = Counter()
        """Exceptions by epoch and index of the batch."""
        self._bad_from_the_start = set(non_finite_weights(pl_module))
        """Parameters that are non-finite on purpose, such as a frozen mask."""
        self._has_stepped = self._accepted = False

    def close(self) -> None:
        """Removes the guard; may be called twice."""
        self._guard.remove()

    def batch_started(self) -> None:
        """Prepares for a new batch."""
        self._guard.batch_started()

    def accepted(self) -> None:
        """Records that the step of an optimizer was accepted."""
        self._accepted = True

    def rolled_back(self) -> None:
        """Forgets a step that this rank had accepted, and the ranks together have undone."""
        self._accepted, self._passes = False, 0

    def batch_ended(self) -> None:
        """Forgets a failure that was responded to; called after the response."""
        self._guard.batch_ended()
        if self._accepted:
            self._has_stepped, self._accepted = True, False
            if not self._alone:  # on the other ranks they have passed too
                self._count_passes()
        failure = self._guard.failure
        if failure is not None and failure.reported:
            self._guard.failure = None

    def explain(self, incident: Incident) -> None:
        """Names the cause of an exception, as far as it is known."""
        failure = self._guard.failure
        if failure is None:
            return
        if failure.bad_weights or failure.bad_buffers:
            names = (*failure.bad_weights, *failure.bad_buffers)
            incident.note("weights damaged from outside", f"{names[0]} was non-finite")
        elif failure.bad_batch:
            incident.note("bad batch", f"in the batch, {'; '.join(failure.findings)}")
        elif incident.verdict == "deterministic" and not incident.anomaly.state_corrupted:
            index = failure.batches[0][1]
            incident.note(
                "the model raises on this batch",
                f"batch {index} raises each time that it is trained on",
            )

    def _passed(self) -> None:
        self._engine.current_batch.raised = False
        self._passes += 1
        if self._alone:
            self._count_passes()

    def _count_passes(self) -> None:
        batch = self._engine.current_batch
        self._good += self._passes
        self._passes = 0
        # Batches before those that raised are replayed; they tell nothing new.
        if self._unexplained and (batch.epoch, batch.index) > max(self._unexplained):
            self._bad += len(self._unexplained)
            self._unexplained = []

    def _contain_alone(self, failure: StepFailure) -> bool:
        """Returns whether the fit goes on, and prepares for it."""
        if not self._has_stepped or not self._prepare(failure) or not self._contain(failure):
            return False
        self._engine.current_batch.raised = True
        return True

    def _contain_together(self, failure: StepFailure) -> bool:
        """Does the same for a step in which batches of any rank have raised."""
        self._passes = 0
        if not self._has_stepped or not self._contain(failure):
            return False
        for batch in self._engine.window:
            batch.raised = (batch.epoch, batch.index) in failure.batches
        return True

    def _prepare(self, failure: StepFailure) -> bool:
        """Adds what can be found out on this rank; returns False if no step is judged here."""
        if self._owner not in callbacks_of(self._trainer):
            return False
        self._examine(failure)
        batch = self._engine.current_batch
        failure.batches = ((batch.epoch, batch.index),)
        return True

    def _contain(self, failure: StepFailure) -> bool:
        new = (
            [] if failure.explained else [b for b in failure.batches if b not in self._unexplained]
        )
        self._count.update(failure.batches)
        row = len(self._unexplained) + len(new)
        if new and row >= suspicious_row(self._bad, self._good):
            self._log_surrender(f"{row} batches in a row; batch, weights and buffers are finite")
            return False
        if max(self._count[batch] for batch in failure.batches) > _OF_ONE_BATCH:
            self._log_surrender(f"the same batch {_OF_ONE_BATCH} times")
            return False
        if failure.late and not self._engine.cut_short():
            return False
        self._unexplained += new
        return True

    def _log_surrender(self, what: str) -> None:
        if not self._trainer.is_global_zero:
            return
        log.warning(
            "training_step raises on %s: leaving batches out does not help, look at the program "
            "and the learning rate; the exception follows",
            what,
        )

    def _examine(self, failure: StepFailure) -> None:
        failure.findings, failure.bad_batch = examine_batch(failure.batch)
        bad = non_finite_weights(self._module)
        failure.bad_weights = tuple(name for name in bad if name not in self._bad_from_the_start)
        failure.bad_buffers = self._engine.damaged_buffers()


def suspicious_row(bad: int, good: int) -> int:
    """Returns how many bad batches in a row are not bad by chance.

    Args:
        bad: earlier batches that raised.
        good: batches that did not.

    >>> [suspicious_row(bad, 100 - bad) for bad in (0, 1, 10, 40, 90)]
    [3, 3, 4, 11, 88]
    """
    share = bad / (bad + good) if bad else 0.0
    if not 0 < share < 1:
        return _IN_A_ROW
    return max(_IN_A_ROW, math.ceil(math.log(_BY_CHANCE) / math.log(share)))


def examine_batch(batch: Any) -> tuple[tuple[str, ...], bool]:
    """Looks for NaN and Inf in a batch.

    Returns:
        One phrase for each tensor that has some, and whether that explains a failure: a negative
        infinity does not, as it is what masks are made of.

    >>> x = torch.zeros(8, 2)
    >>> x[7, 1] = torch.nan
    >>> examine_batch([x, torch.ones(8)])
    (('batch[0] holds 1 nan, sample 7',), True)
    """
    phrases, bad = [], False
    for name, tensor in named_tensors(batch):
        numeric = tensor.is_floating_point() or tensor.is_complex()
        if not numeric or tensor.layout != torch.strided or bool(tensor.isfinite().all()):
            continue
        nan, infinite = tensor.isnan(), tensor.isinf()
        bad = bad or bool(nan.any()) or tensor.is_complex() or bool(tensor.isposinf().any())
        counts = [f"{int(f.sum())} {word}" for f, word in ((nan, "nan"), (infinite, "inf"))]
        held = " and ".join(each for each in counts if not each.startswith("0 "))
        phrases.append(f"{name} holds {held}{_samples(nan | infinite)}")
    return tuple(phrases), bad


def _samples(bad: Tensor) -> str:
    """Returns the indices in the first dimension, as text."""
    if bad.ndim == 0:
        return ""
    rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()
    if len(rows) == len(bad):
        return f", in all {len(bad)} samples"
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f", sample{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_NAMED]))}{more}"


def non_finite_weights(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of parameters that hold a NaN or Inf."""
    named = dict(module.named_parameters())
    return tuple(n for n, ok in zip(named, which_are_finite(named.values()), strict=True) if not ok)
