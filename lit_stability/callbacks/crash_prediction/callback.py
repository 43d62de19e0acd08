"""`CrashPrediction`: takes preventive actions, step by step, before a run diverges.

May import Lightning. `lit_stability.policies.crash_risk` computes the risk and chooses the actions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lit_stability.callbacks.crash_prediction.preventive_actions import (
    PreventiveActions,
    training_stopped,
)
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor, require_supported_strategy
from lit_stability.detectors import Anomaly
from lit_stability.detectors.anomaly import require, require_instance
from lit_stability.incidents import Incident
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import to_each
from lit_stability.policies.backoff import Baseline
from lit_stability.policies.crash_risk import CrashRisk, Prevention, RiskLevels
from lit_stability.trainer_internals import log_every, logger_step
from lit_stability.training_state.gradient_clipping import clip_step
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from lit_stability.training_state.skipped_step import is_skipped

log = suite_logger()

_OWNER = "prediction"


class CrashPrediction(StabilityCallback):
    """Estimates the risk that the run diverges within 20 steps, and acts on it in several levels.

    After each accepted step the risk is computed from the trends of loss, gradient norm, update and
    learning rate. `CrashRisk` explains what it means and what it cannot predict: a sudden jump has
    no trend. When the risk reaches a level, an action takes effect from the next step on. Each
    action is taken and logged once per episode, with the reason:

    * ``save``, 0.3: saves a checkpoint, completely or not at all, in ``risk/`` in
      the folder of the run. It is from a run in danger, not known to be good. Non-finite weights
      are not saved; of sharded weights ModelCheckpoint saves instead.
    * ``slow``, 0.5: learning rate x0.5, which then caps what the scheduler sets; clip x0.5, to the
      median gradient norm. Both are halved again if the risk is still as high 20 steps later, and
      restored step by step once it is gone, see `Prevention`.
    * ``precision``, 0.7: float32 instead of 16-mixed or bf16-mixed, until the episode is over.
      Weights in half precision, and trainers with a `PrecisionFallback`, are unchanged.
    * ``stop``, never by default: the fit ends with `TrainingStopped`.

    Steps that opened an incident are ignored. A run whose risk stays below all levels is
    bit-identical to one without this callback. The learning rates of all optimizers are lowered,
    whichever optimizer the risk belongs to; they multiply with the factors of other callbacks.

    Metrics logged every ``trainer.log_every_n_steps`` accepted steps, to every logger:

    * ``stability/risk``: largest risk since it was last logged, in [0, 1].

    >>> from lit_stability import stability_callbacks
    >>> callbacks = [*stability_callbacks(), CrashPrediction()]

    Args:
        levels: the risk at which each action is taken; None for the defaults of `RiskLevels`.
        relax_after: steps below all levels after which learning rate and clip are raised by half,
            repeatedly, until they are restored.
        keep: number of checkpoints kept.

    Raises:
        ValueError: if an argument is out of its range; at ``setup``, without a `GradientMonitor`
            before it.
        RuntimeError: at ``setup``, under a strategy that is not supported.
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
        self._measured: dict[int, StepStats] = {}
        """The step about to be taken, by optimizer."""
        self._rejected = False
        """Whether a step of the current batch was rejected."""
        self._actions: PreventiveActions | None = None
        self._peak, self._count, self._saved = 0.0, 0, ""

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_actions": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a trainer without a `GradientMonitor` or with an unsupported strategy."""
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores trends and actions in force from a checkpoint, and applies them."""
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
        """Keeps the measurement until all ranks have accepted the step."""
        if self._actions is not None:
            self._pending.append(stats)

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Keeps the measurement until it is known whether the step is skipped."""
        self._measured[stats.optimizer] = stats

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clips the step if the clip is tightened, unless another callback has skipped it."""
        index = next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), -1)
        stats = self._measured.pop(index, None)
        if stats is None or self._actions is None or is_skipped(optimizer):
            return
        threshold = self._baselines[index].clip_threshold(self.prevention.clip_factor)
        if threshold is not None and stats.finite_gradients:
            clip_step(optimizer, stats, threshold)

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Marks the step as rejected, so that it is ignored."""
        self._rejected = True

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Marks the step as rejected, unless the anomaly is only reported."""
        self._rejected = self._rejected or not incident.anomaly.warn_only

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the risk with the steps that all ranks accepted, and acts on it.

        Raises:
            TrainingStopped: if the risk reaches the level ``stop``.
        """
        pending, self._pending = self._pending, []
        rejected, self._rejected = self._rejected, False
        if rejected or not pending or self._actions is None:
            return
        for stats in pending:
            self._risks[stats.optimizer].update(stats)
            self._baselines[stats.optimizer].add(stats.grad_norm, stats.update_ratio)
        self._record(trainer)
        self._respond(trainer, pl_module, pending[-1].step)

    @property
    def risk(self) -> float:
        """The largest risk of any optimizer after the last accepted step, in [0, 1]."""
        return max((risk.value for risk in self._risks.values()), default=0.0)

    def _respond(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        decision = self.prevention.step(self.risk, _scheduled(trainer))
        factor, actions = self._scale(trainer), self._actions
        assert actions is not None, "checked by its caller"
        factors = f"learning rate x{factor:.3g}, clip x{self.prevention.clip_factor:.3g}"
        done: list[str] = []
        if "save" in decision.due:
            self._saved = actions.save()
            done.append(self._saved)
        if "slow" in decision.due:
            done.append(factors)
        if "precision" in decision.due:
            done.append(actions.widen(pl_module))
        worst = max(self._risks.values(), key=lambda risk: risk.value)
        if done:
            self._log_actions(trainer, f"step {step}: {worst.in_words()}", done)
        if "stop" in decision.due:
            raise training_stopped(trainer, worst, step, self._saved)
        switched = actions.narrow(pl_module) if decision.over else ""
        relaxed = [factors if decision.raised else "", switched]
        self._log_actions(trainer, f"step {step}: risk has decreased", relaxed)

    @staticmethod
    def _log_actions(trainer: Trainer, head: str, done: Sequence[str]) -> None:
        line = ", ".join(action for action in done if action)
        if line and trainer.is_global_zero:
            log.info("%s: %s", head, line)

    def _scale(self, trainer: Trainer) -> float:
        """Applies the factors for the next step; returns the smallest."""
        factors = self.prevention.factors(_scheduled(trainer))
        for index, each in factors.items():
            learning_rate_multiplier(trainer.optimizers[index]).set(each, _OWNER)
        return min((factor for each in factors.values() for factor in each), default=1.0)

    def _record(self, trainer: Trainer) -> None:
        self._peak = max(self._peak, self.risk)
        self._count += 1
        if self._count % log_every(trainer):
            return
        risk, step = {"stability/risk": self._peak}, logger_step(trainer)
        to_each(trainer.loggers, lambda logger: logger.log_metrics(risk, step=step))
        self._peak = 0.0

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restores the nominal learning rates, as the optimizers may be saved now."""
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).recover()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves optimizers and precision as they were before the fit."""
        if stage != "fit":
            return
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).detach()
        if self._actions is not None:
            self._actions.close()
        self._actions = None

    def rewindable_state(self) -> dict[str, Any]:
        """Returns the trends and baselines of each optimizer."""
        return {
            str(i): {"risk": risk.state_dict(), "baseline": self._baselines[i].state_dict()}
            for i, risk in self._risks.items()
        }

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Restores the trends and baselines of each optimizer."""
        for i, risk in self._risks.items():
            if str(i) in state:
                risk.load_state_dict(state[str(i)]["risk"])
                self._baselines[i].load_state_dict(state[str(i)]["baseline"])

    def consensus_state(self) -> dict[str, Any]:
        """Returns trends, baselines and actions in force, for ranks that disagree."""
        return {"learnt": self.rewindable_state(), "prevention": self.prevention.state_dict()}

    def load_consensus_state(self, state: Mapping[str, Any]) -> None:
        """Takes over trends, baselines and actions in force from rank 0."""
        self.load_rewindable_state(state["learnt"])
        self.prevention.load_state_dict(state["prevention"])

    def state_dict(self) -> dict[str, Any]:
        """Returns trends, baselines and actions in force; options come from the constructor."""
        learnt = self.rewindable_state() or self._restored.get("learnt", {})
        scalers = {} if self._actions is None else self._actions.scalers()
        return {"learnt": learnt, "prevention": self.prevention.state_dict(), "scalers": scalers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts and the optimizers exist."""
        self._restored = state_dict
        self.prevention.load_state_dict(state_dict["prevention"])


def _scheduled(trainer: Trainer) -> dict[int, list[float]]:
    return {i: learning_rate_multiplier(o).nominal() for i, o in enumerate(trainer.optimizers)}
