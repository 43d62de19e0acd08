"""`CrashPrediction`: acts by degrees while a divergence is still ahead.

May import Lightning; the risk and the choice of responses are `lit_stability.policies.crash_risk`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks.crash_prediction.preventive_actions import PreventiveActions, stopped
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor, require_supported_strategy
from lit_stability.detectors import Anomaly
from lit_stability.detectors.anomaly import require, require_instance
from lit_stability.incidents import Incident
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.backoff import Baseline
from lit_stability.policies.crash_risk import CrashRisk, Prevention, RiskLevels
from lit_stability.trainer_internals import log_every, logger_step
from lit_stability.training_state.gradient_clipping import clip_step
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

log = logging.getLogger("lightning.pytorch.lit_stability")

_OWNER = "prediction"


class CrashPrediction(StabilityCallback):
    """Estimates the risk that the run diverges within 20 steps, and responds to it by degrees.

    After each accepted step the risk follows from the trends of loss, gradient norm, update and
    learning rate; see `CrashRisk` for what it means and what it cannot know: a jump comes
    without a trend. Where it reaches a level, a response is given that is in force from the next
    step on, once an episode and said once, with the reason:

    * ``save``, 0.3: a checkpoint, whole or not at all, in ``risk/`` in ``trainer.log_dir``. It is
      one of a run in danger, not one known to be good; with non-finite weights it is refused,
      under FSDP2 left to ModelCheckpoint.
    * ``slow``, 0.5: learning rate x0.5, and no more than that whatever the scheduler writes; clip
      x0.5, to the median gradient norm. Both again where the risk still asks for it 20 steps later;
      both come back by degrees once it has gone, see `Prevention`.
    * ``precision``, 0.7: float32 instead of 16-mixed or bf16-mixed, until the episode is over.
      Weights in half precision, and trainers with a `PrecisionFallback`, are left as they are.
    * ``stop``, never by default: the fit ends with `TrainingStopped`.

    A step that an incident was opened for teaches nothing. A run whose risk stays below all levels
    is bit-identical to one without this callback. The learning rates of all optimizers are lowered
    whichever the risk is of, with those that other callbacks have lowered: the factors multiply.

    Metrics recorded, every ``trainer.log_every_n_steps`` accepted steps, to every logger:

    * ``stability/risk``: largest risk since it was recorded last, in [0, 1].

    Args:
        levels: risk from which on each response is given; None for the defaults of `RiskLevels`.
        relax_after: steps below all levels after which learning rate and clip are raised by half,
            and again, until they are back.
        keep: checkpoints kept.

    Raises:
        ValueError: if an argument is out of its range; at ``setup``, without a `GradientMonitor`
            before it.
        RuntimeError: at ``setup``, under a strategy that was not tried.
    """

    ignores_skipped_steps = True

    def __init__(
        self, *, levels: RiskLevels | None = None, relax_after: int = 20, keep: int = 2
    ) -> None:
        require(keep >= 1, "keep", keep, "at least 1")
        require_instance("levels", levels, RiskLevels)
        self.prevention = Prevention(levels or RiskLevels(), relax_after=relax_after)
        self.keep = keep
        self._risks: dict[int, CrashRisk] = {}
        self._baselines: dict[int, Baseline] = {}
        self._restored: Mapping[str, Any] = {}
        self._pending: list[StepStats] = []
        self._rejected = False
        """Whether somebody objected to a step of the batch at hand."""
        self._actions: PreventiveActions | None = None
        self._peak, self._count, self._saved = 0.0, 0, ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with what was learnt, and what was in force, before a restart."""
        self._risks = {i: CrashRisk() for i, _ in enumerate(trainer.optimizers)}
        self._baselines = {i: Baseline() for i, _ in enumerate(trainer.optimizers)}
        self.load_rewindable_state(self._restored.get("learnt", {}))
        self._actions = PreventiveActions(trainer, self.keep)
        self._actions.load_scalers(self._restored.get("scalers", {}))
        self._restored = {}
        self._pending, self._rejected = [], False
        self._peak, self._count, self._saved = 0.0, 0, ""
        self._scale(trainer)
        if "precision" in self.prevention.given:
            self._actions.widen(pl_module)

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Clip where the clip is tightened; learn from the step once all have accepted it."""
        factor = self.prevention.clip_factor
        threshold = self._baselines[stats.optimizer].clip_threshold(factor)
        if threshold is not None and stats.finite_gradients:
            clip_step(trainer.optimizers[stats.optimizer], stats, threshold)
        self._pending.append(stats)

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Learn nothing from a step that is objected to."""
        self._rejected = True

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Learn nothing from a step that is objected to."""
        self._rejected = self._rejected or not incident.anomaly.warn_only

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take up what all ranks have accepted, and respond.

        Raises:
            TrainingStopped: where the risk reaches the level for that.
        """
        pending, self._pending = self._pending, []
        rejected, self._rejected = self._rejected, False
        if rejected or not pending:
            return
        for stats in pending:
            self._risks[stats.optimizer].update(stats)
            self._baselines[stats.optimizer].add(stats.grad_norm, stats.update_ratio)
        self._record(trainer)
        self._respond(trainer, pl_module, pending[-1].step)

    @property
    def risk(self) -> float:
        """After the last accepted step, of the optimizer for which it is largest, in [0, 1]."""
        return max((risk.value for risk in self._risks.values()), default=0.0)

    def _respond(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        decision = self.prevention.step(self.risk, _scheduled(trainer))
        factor, actions = self._scale(trainer), self._actions
        assert actions is not None
        bounds = f"learning rate x{factor:.3g}, clip x{self.prevention.clip_factor:.3g}"
        done: list[str] = []
        if "save" in decision.due:
            self._saved = actions.save()
            done.append(self._saved)
        if "slow" in decision.due:
            done.append(bounds)
        if "precision" in decision.due:
            done.append(actions.widen(pl_module))
        worst = max(self._risks.values(), key=lambda risk: risk.value)
        if done:
            self._say(trainer, f"step {step}: {worst.in_words()}", done)
        if "stop" in decision.due:
            raise stopped(trainer, worst, step, self._saved)
        back = actions.narrow(pl_module) if decision.over else ""
        self._say(trainer, f"step {step}: calm", [bounds if decision.raised else "", back])

    @staticmethod
    def _say(trainer: Trainer, head: str, done: Sequence[str]) -> None:
        said = ", ".join(each for each in done if each)
        if said and trainer.is_global_zero:
            log.info("%s: %s", head, said)

    def _scale(self, trainer: Trainer) -> float:
        """Put the factors in force for the next step; returns the smallest."""
        factors = self.prevention.factors(_scheduled(trainer))
        for index, each in factors.items():
            learning_rate_multiplier(trainer.optimizers[index]).set(each, _OWNER)
        return min(factor for each in factors.values() for factor in each)

    def _record(self, trainer: Trainer) -> None:
        self._peak = max(self._peak, self.risk)
        self._count += 1
        if self._count % log_every(trainer):
            return
        for logger in trainer.loggers:
            logger.log_metrics({"stability/risk": self._peak}, step=logger_step(trainer))
        self._peak = 0.0

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no scaled learning rate behind in an optimizer that somebody may save now."""
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).recover()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave optimizers and precision as they were found."""
        if stage != "fit":
            return
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).detach()
        if self._actions is not None:
            self._actions.leave()
        self._actions = None

    def rewindable_state(self) -> dict[str, Any]:
        """What was learnt of each optimizer's steps."""
        return {
            str(i): {"risk": risk.state_dict(), "baseline": self._baselines[i].state_dict()}
            for i, risk in self._risks.items()
        }

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        for i, risk in self._risks.items():
            if str(i) in state:
                risk.load_state_dict(state[str(i)]["risk"])
                self._baselines[i].load_state_dict(state[str(i)]["baseline"])

    def consensus_state(self) -> dict[str, Any]:
        """What was learnt and what is in force, for ranks that disagree."""
        return {"learnt": self.rewindable_state(), "prevention": self.prevention.state_dict()}

    def load_consensus_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what another rank has learnt and has in force."""
        self.load_rewindable_state(state["learnt"])
        self.prevention.load_state_dict(state["prevention"])

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, and the responses in force; the options come from the constructor."""
        learnt = self.rewindable_state() or self._restored.get("learnt", {})
        scalers = {} if self._actions is None else self._actions.scalers()
        return {"learnt": learnt, "prevention": self.prevention.state_dict(), "scalers": scalers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the optimizers are there."""
        self._restored = state_dict
        self.prevention.load_state_dict(state_dict["prevention"])


def _scheduled(trainer: Trainer) -> dict[int, list[float]]:
    return {i: learning_rate_multiplier(o).nominal() for i, o in enumerate(trainer.optimizers)}
