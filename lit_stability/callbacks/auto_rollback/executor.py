"""Chooses the response to an incident, by the escalation policy, and carries it out.

May import Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

from torch.optim import LBFGS

from lit_stability.callbacks.auto_rollback.rollback_engine import RollbackEngine
from lit_stability.callbacks.hooks import call_hook
from lit_stability.callbacks.requirements import gather_of
from lit_stability.detectors import Anomaly
from lit_stability.diagnosis import RecommendedAction
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.norms import dense, norms_of, to_host, total
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import (
    ClipStep,
    HoldLearningRate,
    Response,
    RetryStep,
    RollBack,
    SkipStep,
    Stop,
)
from lit_stability.policies.backoff import Backoff, Baseline
from lit_stability.policies.escalation import EscalationPolicy
from lit_stability.trainer_internals import RecordedBatch, batch_index, parameters_of
from lit_stability.training_state.gradient_clipping import clip_step
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

log = suite_logger()

_OWNER = "rollback"
"""Of its factor on the learning rate."""
_FAR = 10.0
"""Multiple of its level by which a loss is far above it."""


class ResponseExecutor:
    """Everything that `AutoRollback` does in one fit.

    A response has two parts: what must happen before the update (the step is skipped, or the
    learning rate is held), in `respond`, and what must happen after the batch (the step is undone,
    retried or rolled back), in `batch_ended`.

    Args:
        trainer: in its fit.
        pl_module: the module in training.
        engine: undoes steps and restores snapshots.
        escalation: chooses the response.
        backoff: lowers learning rate and clip, and raises both again.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        engine: RollbackEngine,
        escalation: EscalationPolicy,
        backoff: Backoff,
    ) -> None:
        self._trainer, self._module, self._engine = trainer, pl_module, engine
        self._escalation, self._backoff = escalation, backoff
        self._gather = gather_of(trainer)
        self.baselines = [Baseline() for _ in trainer.optimizers]
        """Of each optimizer's healthy steps."""
        self._finder = BadMicroBatchFinder()
        self._pending: tuple[Response, Incident] | None = None
        """The response to carry out at the end of the batch."""
        self._checked: Incident | None = None
        """The incident for which steps were retried last; whether it recurs is its verdict."""
        self._stats: StepStats | None = None
        """Measurement of the current step."""
        self._voted: Literal["clipped", "skipped", ""] = ""
        """What was done to the current step before all ranks had voted on it."""
        self._redrawn: Incident | None = None
        self._moved: Incident | None = None
        """The incident whose step is retried with new random numbers."""
        self._relax_from = 0
        """Step of the anomaly last rolled back for: replayed steps before it relax nothing."""
        self._drop_foreign_holds()
        self.apply_learning_rates()

    def _drop_foreign_holds(self) -> None:
        """Drop held learning rates, restored from a checkpoint, that fit no optimizer."""
        groups = {i: len(o.param_groups) for i, o in enumerate(self._trainer.optimizers)}
        for index, factors in [*self._backoff.holds.items()]:
            if groups.get(index) != len(factors):
                del self._backoff.holds[index]
                log.info(
                    "optimizer %d has other parameter groups than the checkpoint: its held "
                    "learning rates are dropped",
                    index,
                )

    def apply_learning_rates(self) -> None:
        """Puts the factors on the learning rates in force."""
        for index, optimizer in enumerate(self._trainer.optimizers):
            groups = len(optimizer.param_groups)
            factors = self._backoff.factors(index, groups)
            limits = self._backoff.limits_of(index, groups)
            learning_rate_multiplier(optimizer).set(factors, _OWNER, limits)

    @property
    def can_roll_back(self) -> bool:
        """Whether there is a confirmed snapshot."""
        return self._engine.confirmed is not None

    def recent_batches(self) -> tuple[list[Any], int]:
        """See `RollbackEngine.recent_batches`."""
        return self._engine.recent_batches()

    @property
    def confirmed_step(self) -> int | None:
        """The step of the newest confirmed snapshot; None if there is none."""
        return None if self._engine.confirmed is None else self._engine.confirmed.step

    def at_confirmed_step(self) -> AbstractContextManager[tuple[int, int] | None]:
        """See `RollbackEngine.at_confirmed`."""
        return self._engine.at_confirmed()

    @property
    def cadence_record(self) -> dict[str, Any]:
        """How often snapshots are taken, and what one costs, as JSON types."""
        return self._engine.cadence.as_dict()

    @property
    def memory_record(self) -> dict[str, Any]:
        """What the snapshots and the batches take in memory, as JSON types."""
        return self._engine.memory.as_dict()

    @property
    def kept_batches(self) -> int:
        """Batches that are kept to be replayed."""
        return self._engine.kept_batches

    def startup_text(self) -> str:
        """Returns what is kept in memory and how often, in a few words."""
        return self._engine.startup_text()

    def epoch_started(self) -> None:
        """Records the batches of a new epoch, which may have another loader."""
        self._engine.attach_to_data()

    def batch_started(self) -> None:
        """Records to which optimizer step the batch belongs."""
        self._engine.batch_started()

    def backward_ended(self) -> None:
        """Looks for the bad batch while an accumulation window is retried."""
        if self._finder.active:
            self._finder.measure(self._trainer)

    def validation_started(self) -> None:
        """Undoes what hooks of a rejected batch have done since it was undone."""
        self._engine.hooks_ended()

    def epoch_ended(self) -> None:
        """Releases the schedulers that were held for a rejected batch."""
        self._engine.epoch_ended()

    def skip(self, optimizer: int) -> None:
        """Skips the step that an optimizer is about to take."""
        self._engine.skip_step(self._trainer.optimizers[optimizer])

    def measured(self, stats: StepStats) -> None:
        """Remembers the measurement of the step that is judged next."""
        self._stats = stats
        self._engine.measured()

    def object_alone(self, anomaly: Anomaly) -> None:
        """Skips a step that this rank objects to, or clips it if that will be the response."""
        if self._pending is None and self._escalation.clips(anomaly, replay=self._engine.replay):
            self._voted = "clipped"
            self._clip(anomaly)
        else:
            self._voted = "skipped"
            self.skip(anomaly.optimizer)

    def _clip(self, anomaly: Anomaly) -> None:
        """Clips the current gradients to the usual norm, or below it if the clip is tightened."""
        assert self._stats is not None
        assert anomaly.baseline is not None
        tightened = self.baselines[anomaly.optimizer].clip_threshold(self._backoff.clip_factor)
        norm = min(anomaly.baseline, tightened or math.inf)
        clip_step(self._trainer.optimizers[anomaly.optimizer], self._stats, norm)
        self._engine.stepped = True

    def accept(self, stats: StepStats) -> None:
        """Counts a healthy step; clips it if the clip is tightened; relaxes what was tightened."""
        if self._pending is not None and self._engine.replay:
            # The step of another optimizer in this batch was rejected: the whole batch is undone.
            self.skip(stats.optimizer)
            return
        self._engine.healthy()
        self._note_what_helped()
        self._count(stats.step)
        baseline = self.baselines[stats.optimizer]
        threshold = baseline.clip_threshold(self._backoff.clip_factor)
        if threshold is not None and stats.finite_gradients:
            clip_step(self._trainer.optimizers[stats.optimizer], stats, threshold)
        baseline.add(stats.grad_norm, stats.update_ratio)
        if stats.step < self._relax_from:
            return
        relaxed = self._backoff.healthy_step(stats.optimizer, stats.nominal_learning_rates)
        if relaxed is not None:
            self.apply_learning_rates()
            log.info("step %d: %s", stats.step, relaxed)

    def _note_what_helped(self) -> None:
        """Name the random draw, or the batch index, as the cause if the step passes without it."""
        moved, self._moved = self._moved, None
        if moved is not None:
            self._escalation.suspects_index = True
            self._clear_of_blame(moved)
            moved.note(
                "fault of one batch index",
                f"the batch of step {moved.anomaly.step} failed at batch index {moved.batch_idx} "
                f"and passed at {batch_index(self._trainer)}",
            )
        redrawn, self._redrawn = self._redrawn, None
        if redrawn is not None:
            self._clear_of_blame(redrawn)
            redrawn.note(
                "random draw of the step",
                f"step {redrawn.anomaly.step} failed with two batches and the same random "
                "numbers, and passed with others",
            )

    def _clear_of_blame(self, incident: Incident) -> None:
        """Withdraw that the batch is bad: it has passed."""
        for cause in ("bad batch", "the model raises on this batch"):
            incident.withdraw(cause)

    def _count(self, step: int) -> None:
        """Count a healthy step; it may decide whether the retried anomaly is deterministic."""
        verdict = self._escalation.healthy(step)
        if verdict is not None and self._checked is not None:
            self._checked.verdict = self._checked.verdict or verdict
        self._engine.snapshots_paused = self._escalation.reproducibility.active

    def accept_regime(self, stats: StepStats) -> None:
        """Restores what was lowered for steps that turn out to be the new normal."""
        self._escalation.regime_change()
        self._engine.snapshots_paused, self._relax_from = False, 0
        self.baselines[stats.optimizer] = Baseline()
        if self._backoff.undo_cuts():
            self.apply_learning_rates()
            log.info("step %d: learning rate and clip are restored", stats.step)

    def respond(self, incident: Incident) -> None:
        """Chooses the response, and does the part of it that must come before the update."""
        if incident.occurrences == 1:
            self._backoff.remember()
        ignored = incident.anomaly.warn_only and incident.recommended_action != "stop"
        if incident.resolved or ignored:
            return
        self._redrawn = self._moved = None
        self._backoff.disturbed()
        if self._pending is not None and not self._is_graver(incident):
            # The step of another optimizer in this batch was rejected already.
            incident.resolve(self._pending[0])
            self.skip(incident.anomaly.optimizer)
            return
        response = self._choose(incident)
        incident.resolve(response)
        if isinstance(response, HoldLearningRate):
            self._backoff.hold(incident.anomaly.optimizer, response.factors)
            self.apply_learning_rates()
            self._engine.stepped = True
            return
        if isinstance(response, ClipStep):
            if not self._voted:
                self._clip(incident.anomaly)
            return
        self._pending = (response, incident)
        self.skip(incident.anomaly.optimizer)

    def _is_graver(self, incident: Incident) -> bool:
        """Whether the pending response undoes the step only, but the state before it is damaged."""
        undoes_step = self._pending is not None and isinstance(
            self._pending[0], RetryStep | SkipStep
        )
        return undoes_step and incident.anomaly.state_corrupted

    def _choose(self, incident: Incident) -> Response:
        """Ask the escalation policy, with what is known of the damage and of the data."""
        engine = self._engine
        anomaly = self._of_this_step(incident)
        ratio = None if incident.stats is None else incident.stats.update_ratio
        moved_far = anomaly is incident.anomaly and self._is_corrupted(incident)
        corrupted = incident.agree(moved_far, self._gather)
        if corrupted or anomaly.state_corrupted:
            replay = self.can_roll_back and engine.can_replay(
                engine.snapshot_for(anomaly.suspect, older=False)
            )
        else:
            replay = engine.can_retry()
        replay = not incident.agree(not replay, self._gather)
        random = not incident.agree(not engine.may_fail_by_chance(), self._gather)
        # What a program raises at one index may be meant.
        movable = anomaly.kind != "exception" and engine.can_move_index()
        if self._escalation.returns(anomaly, state_corrupted=corrupted):
            incident.verdict = "deterministic"
        self._checked = incident
        response = self._escalation.respond(
            anomaly,
            state_corrupted=corrupted,
            excess=self.baselines[anomaly.optimizer].excess(ratio),
            replay=replay,
            older=engine.has_older_snapshot,
            adjusted=incident.adjusted,
            clippable=self._is_clippable(anomaly),
            random=random,
            movable=not incident.agree(not movable, self._gather),
            loss_rose=incident.agree(_loss_rose(incident), self._gather),
            recommended_action=self._recommended(incident),
            cause=incident.cause,
        )
        if isinstance(response, RollBack) and not self.can_roll_back:
            where = self._engine.memory.where_to_resume()
            return Stop(
                f"there was no memory for a snapshot to go back to ({anomaly.message}); {where}"
            )
        return response

    def _of_this_step(self, incident: Incident) -> Anomaly:
        """Returns the anomaly, as one of the present step if the program damaged weights in it."""
        anomaly = incident.anomaly
        if anomaly.kind != "non-finite weight":
            return anomaly
        damaged = self._engine.damaged_in_this_step()
        if incident.agree(not damaged, self._gather):
            return anomaly
        evidence = f"{damaged[0]} was finite before this step, in which the program writes it"
        incident.note("bad batch", evidence)
        return replace(anomaly, state_corrupted=False, since=None)

    def _recommended(self, incident: Incident) -> RecommendedAction:
        """What the cause recommends, unless the steps have to be replayed first."""
        anomaly = incident.anomaly
        if not anomaly.replay_first or not self._engine.replay:
            return incident.recommended_action
        recurs = self._escalation.returns(anomaly, state_corrupted=True)
        return incident.recommended_action if recurs else "usual"

    def _is_clippable(self, anomaly: Anomaly) -> bool:
        """Whether the gradients can be clipped now, or have been."""
        if isinstance(self._trainer.optimizers[anomaly.optimizer], LBFGS):
            return False  # its closure computes them again
        return self._voted != "skipped" and anomaly.baseline is not None

    def _is_corrupted(self, incident: Incident) -> bool:
        """Whether a weight moved further since the snapshot than training can have moved it."""
        outlier = self._engine.outlier()
        chosen = isinstance(self._trainer.optimizers[incident.anomaly.optimizer], LBFGS)
        if outlier is None or chosen:  # LBFGS chooses how far it moves a weight
            return False
        name, moved, step = outlier
        incident.note(
            "weights damaged from outside",
            f"an element of {name} moved by {moved:.3g} since step {step}, "
            "a thousand times more than any of another parameter",
        )
        return True

    def batch_ended(self) -> None:
        """Does the part of the response that comes after the batch.

        Raises:
            TrainingStopped: if no response in budget is left.
        """
        if self._pending is not None:
            (response, incident), self._pending = self._pending, None
            self._carry_out(response, incident)
            self.apply_learning_rates()
        elif self._engine.stepped:
            self._finder.step_ended(self._trainer.global_step)
        self._voted = ""
        self._engine.batch_ended()

    def _carry_out(self, response: Response, incident: Incident) -> None:
        match response:
            case RetryStep(new_random_numbers, next_index):
                self._finder.begin(len(self._engine.window), incident.anomaly.step)
                self._to_step_start((), incident)
                if new_random_numbers:
                    self._redraw(incident)
                if next_index:
                    # The same batch with another index is no repetition that could clear the step.
                    incident.verdict = "deterministic"
                    self._engine.move_index(incident.anomaly.step)
                    self._moved = incident
            case SkipStep(new_random_numbers):
                self._skip_batch(incident)
                if new_random_numbers:
                    self._redraw(incident)
            case RollBack():
                lasting = incident.recommended_action == "lower"
                optimizers = enumerate(self._trainer.optimizers if lasting else ())
                failed_at = {i: learning_rate_multiplier(o).effective() for i, o in optimizers}
                self._roll_back(response, incident)
                call_hook("on_rollback", self._trainer, self._module)
                self._backoff.cut(
                    response.lr_factor, response.clip_factor, failed_at=failed_at, lasting=lasting
                )
            case Stop():
                self._stop(response, incident)

    def _redraw(self, incident: Incident) -> None:
        self._engine.redraw(incident.anomaly.step)
        self._redrawn = incident

    def _skip_batch(self, incident: Incident) -> None:
        window = self._engine.window
        raised = [batch for batch in window if batch.raised]
        bad = raised or self._finder.bad_batches(window, self._gather)
        self._finder.end()
        possible = bool(bad) and self._engine.can_retry(bad)
        if incident.agree(not possible, self._gather):
            self._engine.drop_step()
        else:
            self._to_step_start(bad, incident)

    def _to_step_start(self, skipped: Collection[RecordedBatch], incident: Incident) -> None:
        if self._engine.to_step_start(skipped):
            self._relax_from = max(self._relax_from, incident.anomaly.step)
            call_hook("on_rollback", self._trainer, self._module)

    def _roll_back(self, response: RollBack, incident: Incident) -> None:
        engine, suspect = self._engine, incident.anomaly.suspect
        snapshot = engine.snapshot_for(suspect, older=response.older)
        if not response.replay:
            engine.to_snapshot_only(snapshot)
            return
        self._relax_from = max(self._relax_from, incident.anomaly.step)
        engine.snapshots_paused = True
        self._finder.begin(len(engine.window), incident.anomaly.step)
        batches = engine.batches_since(snapshot)
        skipped = [each for each in batches if response.skip_suspect and each.step == suspect]
        engine.to_snapshot(snapshot, skipped)

    def _stop(self, response: Stop, incident: Incident) -> None:
        if self.can_roll_back:
            snapshot = self._engine.snapshot_for(incident.anomaly.suspect, older=False)
            self._engine.to_last_snapshot(snapshot)
            call_hook("on_rollback", self._trainer, self._module)
        now, at = self._trainer.global_step, incident.anomaly.step
        restored = f", weights restored to step {now}" if now < at else ""
        raise TrainingStopped(
            f"training stopped at step {at}{restored}: {response.reason}. {incident.advice}",
            incident,
        )

    def consensus_state(self) -> dict[str, Any]:
        """Returns what the ranks must agree on, beyond what a checkpoint holds."""
        policy = self._escalation
        return {
            "checks": (policy.reproducibility, policy.retried, policy.lowered),
            "before": self._backoff.before,
            "baselines": [baseline.state_dict() for baseline in self.baselines],
        }

    def load_consensus_state(self, state: Mapping[str, Any]) -> None:
        """Takes over the `consensus_state` of rank 0."""
        policy = self._escalation
        policy.reproducibility, policy.retried, policy.lowered = state["checks"]
        self._backoff.before = state["before"]
        for baseline, saved in zip(self.baselines, state["baselines"], strict=True):
            baseline.load_state_dict(saved)
        self._engine.snapshots_paused, self._checked = policy.reproducibility.active, None
        self._finder.end()

    def close(self) -> None:
        """Leaves the trainer as it was before the fit."""
        self._engine.close()


def _loss_rose(incident: Incident) -> bool:
    """Returns whether the loss is far above its level before the incident."""
    stats, before = incident.stats, incident.before
    if stats is None or before is None:
        return False
    return stats.loss > before.middle + _FAR * max(abs(before.middle), before.spread)


class BadMicroBatchFinder:
    """Finds the bad batch of an accumulation window while the window is retried.

    Steps before it may be replayed first.
    """

    def __init__(self) -> None:
        self.active = False
        self._step = 0
        self._norms: list[float] = []
        """Norm of the accumulated gradients after each batch."""

    def begin(self, batches: int, step: int) -> None:
        """Measures after each batch until a step has ended, if its window has several."""
        self.active, self._norms, self._step = batches > 1, [], step

    def step_ended(self, steps: int) -> None:
        """Clears the norms of a step that was accepted, and ends if it was the one asked for.

        Args:
            steps: optimizer steps taken so far.
        """
        self.active, self._norms = self.active and steps <= self._step, []

    def end(self) -> None:
        """Stops measuring: the window is over."""
        self.active, self._norms = False, []

    def measure(self, trainer: Trainer) -> None:
        """Measures the norm of this rank's gradients, or of its shards of them."""
        found = [p.grad for o in trainer.optimizers for p in parameters_of(o) if p.grad is not None]
        norms = to_host({"norms": norms_of([dense(grad) for grad in found])})
        self._norms.append(total(norms["norms"]))

    def bad_batches(
        self, window: list[RecordedBatch], gather: Callable[[Any], list[Any]]
    ) -> list[RecordedBatch]:
        """Returns the batch that made a step bad, on any rank, or the whole window.

        The first batch with non-finite gradients, or else the one that changed the norm of the
        accumulated gradients most.
        """
        ranks = gather(self._norms if len(window) == len(self._norms) else [])
        if not all(ranks):
            return window
        steps = [[b - a for a, b in zip([0.0, *n], n, strict=False)] for n in ranks]
        bad = [i for norms in ranks for i, n in enumerate(norms) if not math.isfinite(n)]
        moved = [max(abs(step) for step in of_ranks) for of_ranks in zip(*steps, strict=True)]
        return [window[min(bad) if bad else moved.index(max(moved))]]
