"""What `AutoRollback` does about an incident: asks the ladder, and carries the response out."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.auto_rollback.rollback_engine import RollbackEngine
from lit_stability.callbacks.hooks import call_hook
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.measurement.norms import dense, norms_of, to_host, total
from lit_stability.policies.actions import Response, RetryStep, RollBack, SkipStep, Stop
from lit_stability.policies.backoff import Backoff, Baseline
from lit_stability.policies.escalation import EscalationPolicy
from lit_stability.trainer_internals import RecordedBatch, parameters_of


class ResponseExecutor:
    """The incident of a fit that is being treated, and how far the treatment is.

    Args:
        engine: takes the fit back.
        escalation: chooses.
        backoff: lowers learning rate and clip.
        optimizers: how many there are.
    """

    def __init__(
        self,
        engine: RollbackEngine,
        escalation: EscalationPolicy,
        backoff: Backoff,
        optimizers: int,
    ) -> None:
        self.engine, self._escalation, self._backoff = engine, escalation, backoff
        self.baselines = [Baseline() for _ in range(optimizers)]
        self.finder = BadMicroBatchFinder()
        self.due: tuple[Response, Incident] | None = None
        """What is to be done at the end of the batch."""
        self.checked: Incident | None = None
        """The incident for which steps were taken again last."""
        self.trouble = 0
        """The step of the anomaly last rolled back for; until then, no relaxing."""

    def choose(self, incident: Incident) -> Response:
        """Ask the ladder, with what is known of the damage and of the data."""
        anomaly, engine = incident.anomaly, self.engine
        ratio = None if incident.stats is None else incident.stats.update_ratio
        damaged = incident.agree(self._damaged(incident))
        if damaged or anomaly.state_corrupted:
            replay = engine.can_replay(engine.snapshot_for(anomaly.suspect, older=False))
        else:
            replay = engine.can_retry()
        replay = not incident.agree(not replay)
        if self._escalation.returns(anomaly, state_corrupted=damaged):
            incident.verdict = "deterministic"
        self.checked = incident
        return self._escalation.respond(
            anomaly,
            state_corrupted=damaged,
            excess=self.baselines[anomaly.optimizer].excess(ratio),
            replay=replay,
            older=engine.snapshots.older is not None,
            adjusted=incident.adjusted,
            recommended_action=incident.recommended_action,
            cause=incident.cause,
        )

    def reached(self, step: int) -> None:
        """Count a healthy step; it may tell what the incident on trial is."""
        verdict = self._escalation.healthy(step)
        if verdict is not None and self.checked is not None:
            self.checked.verdict = self.checked.verdict or verdict
        self.engine.snapshots_paused = self._escalation.reproducibility.active

    def carry_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due, at the end of the batch.

        Raises:
            TrainingStopped: when the ladder has nothing left.
        """
        if self.due is None:
            return
        (response, incident), self.due = self.due, None
        match response:
            case RetryStep():
                self.finder.begin(len(self.engine.window))
                self.engine.to_step_start(())
            case SkipStep():
                self._skip(incident)
            case RollBack():
                self._roll_back(response, incident)
                call_hook("on_rollback", trainer, pl_module)
                lasting = incident.recommended_action == "lower"
                self._backoff.cut(response.lr_factor, response.clip_factor, lasting=lasting)
            case Stop():
                suspect = incident.anomaly.suspect
                self.engine.to_snapshot_only(self.engine.snapshot_for(suspect, older=False))
                call_hook("on_rollback", trainer, pl_module)
                context = f", scene: {incident.path}" if incident.path else ""
                raise TrainingStopped(
                    f"training stopped at step {trainer.global_step}: {response.reason}. "
                    f"What to try: {incident.remedy}. Record: {incident.record}{context}",
                    incident,
                )

    def _skip(self, incident: Incident) -> None:
        offenders = self.finder.offenders(self.engine.window, incident)
        self.finder.end()
        possible = bool(offenders) and self.engine.can_retry(offenders)
        if incident.agree(not possible):
            self.engine.drop_step()
        else:
            self.engine.to_step_start(offenders)

    def _roll_back(self, response: RollBack, incident: Incident) -> None:
        engine, suspect = self.engine, incident.anomaly.suspect
        snapshot = engine.snapshot_for(suspect, older=response.older)
        if not response.replay:
            engine.to_snapshot_only(snapshot)
            return
        self.trouble = max(self.trouble, incident.anomaly.step)
        engine.snapshots_paused = True
        batches = engine.ring.since(snapshot.position)
        left_out = [e for e in batches if response.leave_out and e.step == suspect]
        engine.to_snapshot(snapshot, left_out)

    def _damaged(self, incident: Incident) -> bool:
        """Whether a weight moved further since the snapshot than training can have moved it."""
        confirmed = self.engine.snapshots.confirmed
        outlier = None if confirmed is None else confirmed.module.outlier()
        if confirmed is None or outlier is None:
            return False
        name, moved = outlier
        incident.note(
            "weights damaged from outside",
            f"an element of {name} moved by {moved:.3g} since step {confirmed.step}, "
            "a thousand times more than any of another parameter",
        )
        return True


class BadMicroBatchFinder:
    """Which batch of an accumulation window is to blame, seen while it is taken again."""

    def __init__(self) -> None:
        self.active = False
        self._norms: list[float] = []
        """Norm of the gradients accumulated, after each batch."""

    def begin(self, batches: int) -> None:
        """Look at the gradients after each batch, where a window has several."""
        self.active, self._norms = batches > 1, []

    def end(self) -> None:
        """The window is through."""
        self.active, self._norms = False, []

    def look(self, trainer: Trainer) -> None:
        """Note the norm of this rank's gradients, or of its shards of them."""
        found = [p.grad for o in trainer.optimizers for p in parameters_of(o) if p.grad is not None]
        norms = to_host({"norms": norms_of([dense(grad) for grad in found])})
        self._norms.append(total(norms["norms"]))

    def offenders(self, window: list[RecordedBatch], incident: Incident) -> list[RecordedBatch]:
        """The batch that is to blame for a bad step, of any rank, or all of its window."""
        ranks = incident.gather(self._norms if len(window) == len(self._norms) else [])
        if not all(ranks):
            return window
        steps = [[b - a for a, b in zip([0.0, *n], n, strict=False)] for n in ranks]
        bad = [i for norms in ranks for i, n in enumerate(norms) if not math.isfinite(n)]
        moved = [max(abs(step) for step in of_ranks) for of_ranks in zip(*steps, strict=True)]
        return [window[min(bad) if bad else moved.index(max(moved))]]
