"""What `AutoRollback` does about an incident: asks the ladder, and carries the response out."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.auto_rollback.rollback_engine import Rewinder
from lit_stability.callbacks.hooks import call_hook
from lit_stability.incidents import Incident, TrainingStopped
from lit_stability.measurement.norms import dense, norms_of, to_host, total
from lit_stability.policies.actions import Response, RollBack, RunAgain, SkipStep, Stop
from lit_stability.policies.backoff import Baseline, Throttle
from lit_stability.policies.escalation import Ladder
from lit_stability.trainer_internals import Entry, parameters_of


class Treatment:
    """The incident of a fit that is being treated, and how far the treatment is.

    Args:
        rewinder: takes the fit back.
        ladder: chooses.
        throttle: lowers learning rate and clip.
        optimizers: how many there are.
    """

    def __init__(
        self, rewinder: Rewinder, ladder: Ladder, throttle: Throttle, optimizers: int
    ) -> None:
        self.rewinder, self._ladder, self._throttle = rewinder, ladder, throttle
        self.baselines = [Baseline() for _ in range(optimizers)]
        self.inspection = Inspection()
        self.due: tuple[Response, Incident] | None = None
        """What is to be done at the end of the batch."""
        self.on_trial: Incident | None = None
        """The incident for which steps were taken again last."""
        self.trouble = 0
        """The step of the anomaly last rolled back for; until then, no relaxing."""

    def choose(self, incident: Incident) -> Response:
        """Ask the ladder, with what is known of the damage and of the data."""
        anomaly, rewinder = incident.anomaly, self.rewinder
        ratio = None if incident.stats is None else incident.stats.update_ratio
        damaged = incident.agree(self._damaged(incident))
        if damaged or anomaly.state_is_bad:
            replay = rewinder.can_replay(rewinder.snapshot_for(anomaly.suspect, older=False))
        else:
            replay = rewinder.can_take_again()
        replay = not incident.agree(not replay)
        if self._ladder.returns(anomaly, state_is_bad=damaged):
            incident.verdict = "deterministic"
        self.on_trial = incident
        return self._ladder.respond(
            anomaly,
            state_is_bad=damaged,
            excess=self.baselines[anomaly.optimizer].excess(ratio),
            replay=replay,
            older=rewinder.snapshots.older is not None,
            adjusted=incident.adjusted,
            course=incident.course,
            cause=incident.cause,
        )

    def reached(self, step: int) -> None:
        """Count a healthy step; it may tell what the incident on trial is."""
        verdict = self._ladder.healthy(step)
        if verdict is not None and self.on_trial is not None:
            self.on_trial.verdict = self.on_trial.verdict or verdict
        self.rewinder.on_trial = self._ladder.trial.active

    def carry_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due, at the end of the batch.

        Raises:
            TrainingStopped: when the ladder has nothing left.
        """
        if self.due is None:
            return
        (response, incident), self.due = self.due, None
        match response:
            case RunAgain():
                self.inspection.begin(len(self.rewinder.window))
                self.rewinder.to_step_start(())
            case SkipStep():
                self._skip(incident)
            case RollBack():
                self._roll_back(response, incident)
                call_hook("on_rollback", trainer, pl_module)
                lasting = incident.course == "lower"
                self._throttle.cut(response.lr_factor, response.clip_factor, lasting=lasting)
            case Stop():
                suspect = incident.anomaly.suspect
                self.rewinder.to_snapshot_only(self.rewinder.snapshot_for(suspect, older=False))
                call_hook("on_rollback", trainer, pl_module)
                scene = f", scene: {incident.path}" if incident.path else ""
                raise TrainingStopped(
                    f"training stopped at step {trainer.global_step}: {response.reason}. "
                    f"What to try: {incident.remedy}. Record: {incident.record}{scene}",
                    incident,
                )

    def _skip(self, incident: Incident) -> None:
        offenders = self.inspection.offenders(self.rewinder.window, incident)
        self.inspection.end()
        possible = bool(offenders) and self.rewinder.can_take_again(offenders)
        if incident.agree(not possible):
            self.rewinder.forget_step()
        else:
            self.rewinder.to_step_start(offenders)

    def _roll_back(self, response: RollBack, incident: Incident) -> None:
        rewinder, suspect = self.rewinder, incident.anomaly.suspect
        snapshot = rewinder.snapshot_for(suspect, older=response.older)
        if not response.replay:
            rewinder.to_snapshot_only(snapshot)
            return
        self.trouble = max(self.trouble, incident.anomaly.step)
        rewinder.on_trial = True
        batches = rewinder.ring.since(snapshot.position)
        left_out = [e for e in batches if response.leave_out and e.step == suspect]
        rewinder.to_snapshot(snapshot, left_out)

    def _damaged(self, incident: Incident) -> bool:
        """Whether a weight moved further since the snapshot than training can have moved it."""
        confirmed = self.rewinder.snapshots.confirmed
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


class Inspection:
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

    def offenders(self, window: list[Entry], incident: Incident) -> list[Entry]:
        """The batch that is to blame for a bad step, of any rank, or all of its window."""
        ranks = incident.gather(self._norms if len(window) == len(self._norms) else [])
        if not all(ranks):
            return window
        steps = [[b - a for a, b in zip([0.0, *n], n, strict=False)] for n in ranks]
        bad = [i for norms in ranks for i, n in enumerate(norms) if not math.isfinite(n)]
        moved = [max(abs(step) for step in of_ranks) for of_ranks in zip(*steps, strict=True)]
        return [window[min(bad) if bad else moved.index(max(moved))]]
