"""`AutoRollback`: carries out the response that the ladder chooses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.auto_rollback.executor import ResponseExecutor
from lit_stability.callbacks.auto_rollback.rollback_engine import RollbackEngine
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import (
    require_monitor,
    require_supported_strategy,
    require_whole_optimizers,
)
from lit_stability.detectors import Anomaly
from lit_stability.detectors.anomaly import require_instance
from lit_stability.incidents import Incident
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.actions import HoldLearningRate
from lit_stability.policies.backoff import Backoff, Baseline
from lit_stability.policies.escalation import Budget, EscalationPolicy
from lit_stability.trainer_internals import Stateful
from lit_stability.training_state.gradient_clipping import clip_step
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

log = logging.getLogger("lightning.pytorch.lit_stability")

_OWNER = "rollback"
"""Owner of this callback's factors on the learning rate."""


class AutoRollback(StabilityCallback):
    """Takes bad steps back, holds a jumping learning rate, rolls back damage, knows its limits.

    With ``data="replay"`` the fit goes on as if the bad batch had never existed, bit for bit:
    weights, optimizers, schedulers, scaler, RNG, ``global_step``, logged metrics, validation
    points and the decisions of ModelCheckpoint and EarlyStopping. A rejected step is taken again
    once, which shows whether the trouble was *transient* or is *deterministic*; if it returns, its
    batch is left out. Damaged state is put back to the newest snapshot, confirmed by
    ``confirm_after`` healthy steps, from before the suspected cause, and all batches since are
    trained on again; if the damage returns, without the suspected batch, then from the snapshot
    before, then with a lower learning rate and a tighter clip. Checkpoint files written since the
    snapshot are renamed to ``NAME.quarantined``.

    What stays, batch after batch and after going back, is no fault but a change of regime: a loss
    with another term, data of another scale. The detectors accept it (`Spike` after 30 refusals),
    what was lowered for it is put back, and the fit goes on; the batches left out stay left out.

    Where a `Diagnosis` before it finds that the learning rate is likely too high, the first
    rollback lowers it; where the architecture is certain to be the cause, the fit stops.

    With ``data="skip"``, and where batches cannot be replayed, a rejected step costs its batch and
    a rollback goes on with new data, ``global_step`` rewound. When the ladder has nothing left,
    the fit ends with `TrainingStopped`, the weights at the last confirmed snapshot.

    Two snapshots of weights, buffers and optimizer state are held in memory, and the raw batches
    since the older; their sizes are reported when they are first known.

    Args:
        data: what happens to the batches since the snapshot.
        snapshot_every: healthy optimizer steps between snapshots, if the last one is confirmed.
        confirm_after: healthy steps after which a snapshot may be gone back to.
        relax_after: calm steps after which a lowered learning rate and a tightened clip are
            doubled, until both are back. A learning rate that is held against a jump of its
            schedule is let go when the schedule comes back.
        budget: how many responses the run may spend.
        max_ring_bytes: bound on the raw batches kept; beyond it they cannot be replayed.
        clone_batches: keep copies, for a ``training_step`` that writes into its batch.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        *,
        data: Literal["replay", "skip"] = "replay",
        snapshot_every: int = 20,
        confirm_after: int = 10,
        relax_after: int = 20,
        budget: Budget | None = None,
        max_ring_bytes: int = 2**30,
        clone_batches: bool = False,
    ) -> None:
        if data not in ("replay", "skip"):
            raise ValueError(f"data must be 'replay' or 'skip', got {data!r}")
        for name, value in (
            ("snapshot_every", snapshot_every),
            ("confirm_after", confirm_after),
            ("max_ring_bytes", max_ring_bytes),
        ):
            if not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        require_instance("budget", budget, Budget)
        self.data = data
        self.snapshot_every = snapshot_every
        self.confirm_after = confirm_after
        self.max_ring_bytes = max_ring_bytes
        self.clone_batches = clone_batches
        self.backoff = Backoff(relax_after)
        self.escalation = EscalationPolicy(budget)
        self._registered: list[Stateful] = []
        self._fit: ResponseExecutor | None = None

    def register(self, *objects: Stateful) -> None:
        """Let a rollback take back the state of further objects, such as an average of weights.

        A rejected step may have touched them, so it is taken back by way of the snapshot too.

        Args:
            objects: with ``state_dict`` and ``load_state_dict``.

        Raises:
            TypeError: if one lacks them.
        """
        for each in objects:
            if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
                raise TypeError(
                    f"register() needs state_dict and load_state_dict, {type(each).__name__} "
                    "lacks them"
                )
            self._registered.append(each)

    @property
    def can_roll_back(self) -> bool:
        """Whether there is a snapshot to go back to."""
        return self._fit is not None and self._fit.engine.snapshots.confirmed is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: without a `GradientMonitor` before it.
            RuntimeError: under a strategy that was not tried.
        """
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of the data, and put restored factors in force."""
        require_whole_optimizers(trainer, self)
        engine = RollbackEngine(
            trainer,
            pl_module,
            confirm_after=self.confirm_after,
            snapshot_every=self.snapshot_every,
            replay=self.data == "replay",
            max_ring_bytes=self.max_ring_bytes,
            clone=self.clone_batches,
            registered=self._registered,
        )
        self._fit = ResponseExecutor(engine, self.escalation, self.backoff, len(trainer.optimizers))
        groups = {i: len(o.param_groups) for i, o in enumerate(trainer.optimizers)}
        for index, factors in [*self.backoff.holds.items()]:
            if groups.get(index) != len(factors):
                del self.backoff.holds[index]
                log.info("the learning rates held before belong to other groups: let go")
        self._apply(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of the data where the loader is a new one."""
        self._now.engine.recorder.attach()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note to which step the batch belongs."""
        self._now.engine.batch_started()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """While an accumulation window is taken again, see which of its batches is the bad one."""
        if self._now.finder.active:
            self._now.finder.look(trainer)

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Count the step, clip where the clip is tightened, relax what was tightened."""
        now = self._now
        if now.due is not None and now.engine.replay:
            # Another optimizer of this batch was vetoed: the whole batch is to be taken back.
            now.engine.skip_step(trainer.optimizers[stats.optimizer])
            return
        now.engine.healthy()
        now.reached(stats.step)
        baseline = now.baselines[stats.optimizer]
        threshold = baseline.clip_threshold(self.backoff.clip_factor)
        if threshold is not None and stats.finite_gradients:
            clip_step(trainer.optimizers[stats.optimizer], stats, threshold)
        baseline.add(stats.grad_norm, stats.update_ratio)
        if stats.step < now.trouble:
            return
        relaxed = self.backoff.calm(stats.optimizer, stats.nominal_learning_rates)
        if relaxed is not None:
            self._apply(trainer)
            log.info("step %d: %s", stats.step, relaxed)

    def on_regime_change(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Undo what was lowered for the incident that turns out to be none."""
        now = self._now
        self.escalation.regime_change()
        now.engine.snapshots_paused, now.trouble = False, 0
        now.baselines[stats.optimizer] = Baseline()
        if self.backoff.put_back():
            self._apply(trainer)
            log.info("step %d: learning rate and clip are what they were before", stats.step)

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Take no step that one rank objects to, until all have voted; choose nothing yet."""
        self._now.engine.skip_step(trainer.optimizers[anomaly.optimizer])

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Choose the response, and do the part of it that must come before the update."""
        if incident.occurrences == 1:
            self.backoff.remember()
        if incident.resolved or (
            incident.anomaly.warn_only and incident.recommended_action != "stop"
        ):
            return
        now, optimizer = self._now, trainer.optimizers[incident.anomaly.optimizer]
        self.backoff.disturbed()
        if now.due is not None:
            # Another optimizer of this batch has struck already.
            incident.resolve(now.due[0])
            now.engine.skip_step(optimizer)
            return
        response = now.choose(incident)
        incident.resolve(response)
        if isinstance(response, HoldLearningRate):
            self.backoff.hold(incident.anomaly.optimizer, response.factors)
            self._apply(trainer)
            now.engine.stepped = True
            return
        now.due = (response, incident)
        now.engine.skip_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do the part of the response that comes after the step.

        Raises:
            TrainingStopped: when the ladder has nothing left.
        """
        now = self._now
        if now.due is not None:
            now.carry_out(trainer, pl_module)
            self._apply(trainer)
        elif now.engine.stepped:
            now.finder.end()
        now.engine.batch_ended()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of what was held for the rest of a rejected batch."""
        self._now.engine.epoch_ended()

    @property
    def _now(self) -> ResponseExecutor:
        assert self._fit is not None, "between on_train_start and teardown only"
        return self._fit

    def _apply(self, trainer: Trainer) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            factors = self.backoff.factors(index, len(optimizer.param_groups))
            learning_rate_multiplier(optimizer).set(factors, _OWNER)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no scaled learning rate behind in an optimizer that somebody may save now."""
        if self._fit is not None:
            self._fit.engine.close()
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).recover()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave optimizers and memory as they were found."""
        if stage == "fit":
            for optimizer in trainer.optimizers:
                learning_rate_multiplier(optimizer).detach()
            if self._fit is not None:
                self._fit.engine.close()
            self._fit = None

    def lower_learning_rate(self, factor: float) -> bool:
        """Multiply learning rate and clip by a factor; calm steps raise both again."""
        self.backoff.cut(factor, factor)
        return True

    def consensus_state(self) -> dict[str, Any]:
        """What was spent, what is in force and what is healthy, for ranks that disagree."""
        return {
            **self.state_dict(),
            "trials": (
                self.escalation.reproducibility,
                self.escalation.retried,
                self.escalation.lowered,
            ),
            "before": self.backoff.before,
            "baselines": [baseline.state_dict() for baseline in self._now.baselines],
        }

    def load_consensus_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what another rank has spent and has in force."""
        now = self._now
        self.load_state_dict(state)
        self.escalation.reproducibility, self.escalation.retried, self.escalation.lowered = state[
            "trials"
        ]
        self.backoff.before = state["before"]
        for baseline, saved in zip(now.baselines, state["baselines"], strict=True):
            baseline.load_state_dict(saved)
        now.engine.snapshots_paused, now.checked = self.escalation.reproducibility.active, None
        now.finder.end()

    def state_dict(self) -> dict[str, Any]:
        """What was spent and what is in force; the options come from the constructor."""
        return {"ladder": self.escalation.state_dict(), "throttle": self.backoff.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put such a state back; it is in force from the start of training."""
        self.escalation.load_state_dict(state_dict["ladder"])
        self.backoff.load_state_dict(state_dict["throttle"])
