"""`AdaptiveGradientClipping`: clips each step to a threshold that a rule computes.

May import Lightning.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import LBFGS, Optimizer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor, require_supported_strategy
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.step_stats import StepStats
from lit_stability.outside import to_each
from lit_stability.policies.clip_rules import (
    ClipRule,
    ClipsTensors,
    CutsLearningRate,
    PercentileClip,
)
from lit_stability.trainer_internals import adapter_of, log_every, logger_step
from lit_stability.training_state.gradient_clipping import clip_step, clip_tensors
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier
from lit_stability.training_state.skipped_step import is_skipped

log = suite_logger()

_OWNER = "clipping"


class AdaptiveGradientClipping(StabilityCallback):
    """Clips the gradients of each optimizer to a norm that a rule chooses at each step.

    A step is clipped in place just before its update, from the norm that `GradientMonitor`
    measured: accumulated, unscaled, of all ranks together. The rule learns from each step that is
    applied, including a step that opened an incident but was not skipped. It never learns from a
    skipped step or from a non-finite norm. A non-finite norm is not clipped, because no factor
    repairs it; that is the task of a responder such as `AutoRollback`. If the threshold is never
    reached, the run is bit-identical to one without this callback.

    A rule that is a `ClipsTensors` limits each tensor by itself, by norms that are on the host
    already. If `AutoRollback` has tightened the clip as well, the smaller threshold applies, and
    the learning-rate factors of both multiply. ``Trainer(gradient_clip_val=...)`` clips afterwards.
    What a rule has learnt is saved in checkpoints and in the snapshots that a rollback restores.
    Every optimizer has its own copy of the rule.

    Metrics logged every ``trainer.log_every_n_steps`` applied steps, to every logger:

    * ``stability/clip_threshold``: the norm that this step was clipped to, or would have been.
    * ``stability/clip_coefficient``: smallest factor that was applied to the measured gradients
      since it was last logged, in (0, 1]; 1 if nothing was clipped. Of a rule that clips each
      tensor by itself, the norm that was left over the norm that was measured.

    Both are absent for a step whose norm is not finite, the first also where a rule has no
    threshold for the whole gradient. With several optimizers, the metrics of the
    second have the suffix ``_1``, and so on. The console reports when a rule lowers or restores the
    learning rate and, at the end of the fit, how many steps were clipped.

    >>> from lit_stability import stability_callbacks
    >>> from lit_stability.policies.clip_rules import PercentileClip
    >>> clip = AdaptiveGradientClipping(rule=PercentileClip())
    >>> callbacks = [*stability_callbacks(), clip]  # for a Trainer without gradient_clip_val

    Args:
        rule: from `lit_stability.policies.clip_rules`, or one of your own; None for
            `PercentileClip`.

    Raises:
        ValueError: if `rule` is not a clip rule; at ``setup``, without a `GradientMonitor` before
            it; at the start of training with `LBFGS`, because only the first gradients of each of
            its steps are measured.
        RuntimeError: at ``setup``, under a strategy that is not supported.
    """

    ignores_skipped_steps = True

    def __init__(self, *, rule: ClipRule | None = None) -> None:
        rule = PercentileClip() if rule is None else rule
        if isinstance(rule, type) or not isinstance(rule, ClipRule):
            raise ValueError(
                "rule must be an object with threshold, update, state_dict and load_state_dict, "
                f"such as lit_stability.policies.clip_rules.PercentileClip(), got {rule!r}"
            )
        self.rule = rule
        """The rule as given. It does not learn; the copies of the optimizers do."""
        self.taken = 0
        """Steps with a finite norm that were applied in this fit, or in the last one."""
        self.clipped = 0
        """Steps among `taken` that were clipped."""
        self._rules: dict[int, ClipRule] = {}
        self._cutting: dict[int, CutsLearningRate] = {}
        """The rules that also lower the learning rate."""
        self._restored: Mapping[str, Any] = {}
        self._measured: dict[int, StepStats] = {}
        self._smallest: dict[int, float] = {}
        """Smallest coefficient of each optimizer since it was last logged."""
        self._count: dict[int, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a trainer without a `GradientMonitor` or with an unsupported strategy."""
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives every optimizer a copy of the rule, with the state restored from a checkpoint."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    "AdaptiveGradientClipping cannot clip an LBFGS optimizer: only the first "
                    "gradients of each step are measured; use Trainer(gradient_clip_val=...)"
                )
        self._rules = {i: copy.deepcopy(self.rule) for i, _ in enumerate(trainer.optimizers)}
        self._cutting = {i: r for i, r in self._rules.items() if isinstance(r, CutsLearningRate)}
        self.load_rewindable_state(self._restored)
        self._restored = {}
        self.taken = self.clipped = 0
        self._measured, self._smallest, self._count = {}, {}, {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Applies the learning-rate factors that the rules have before the norm is known."""
        for index, rule in self._cutting.items():
            self._scale(trainer, trainer.optimizers[index], rule.lr_factor())

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Keeps the measurement until it is known whether the step is skipped."""
        self._measured[stats.optimizer] = stats

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clips the step and updates the rule, unless another callback has skipped the step."""
        index = next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), -1)
        stats = self._measured.pop(index, None)
        if stats is None or is_skipped(optimizer) or not stats.finite_gradients:
            return
        rule = self._rules[index]
        threshold = rule.threshold(stats.grad_norm)
        coefficient = clip_step(optimizer, stats, threshold)
        clipped = stats.grad_norm > threshold
        if isinstance(rule, ClipsTensors):
            coefficient, tensors = self._clip_tensors(trainer, pl_module, optimizer, stats, rule)
            clipped = clipped or tensors
        if index in self._cutting:
            factor = self._cutting[index].lr_factor(stats.grad_norm)
            self._scale(trainer, optimizer, factor, stats)
        rule.update(stats.grad_norm)
        self._record(trainer, index, threshold, coefficient, clipped=clipped)

    @staticmethod
    def _clip_tensors(
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
        stats: StepStats,
        rule: ClipsTensors,
    ) -> tuple[float, bool]:
        """Clips each tensor by itself; returns the factor on the norm, and if any was clipped."""
        thresholds = rule.tensor_thresholds(stats.names)
        parameters = dict(adapter_of(trainer).named_parameters(pl_module))
        left = clip_tensors(optimizer, stats, parameters, thresholds)
        rule.update_tensors(stats.names, left)
        factor = math.hypot(*left) / stats.grad_norm if stats.grad_norm else 1.0
        pairs = zip(stats.grad_norms, thresholds, strict=True)
        return min(factor, 1.0), any(norm > limit for norm, limit in pairs)

    def _scale(
        self, trainer: Trainer, optimizer: Optimizer, factor: float, stats: StepStats | None = None
    ) -> None:
        scale, groups = learning_rate_multiplier(optimizer), len(optimizer.param_groups)
        previous = min(scale.held_by(_OWNER), default=1.0)
        if factor == previous:
            return
        scale.set([factor] * groups, _OWNER)
        change = f"learning rate x{factor:.3g}" if factor < 1 else "learning rate restored"
        if stats is not None:
            change = f"gradient norm {stats.grad_norm:.4g}: {change}"
        if trainer.is_global_zero:
            log.info("step %d: %s by AdaptiveGradientClipping", trainer.global_step, change)

    def _record(
        self, trainer: Trainer, index: int, threshold: float, coefficient: float, *, clipped: bool
    ) -> None:
        self.taken += 1
        self.clipped += clipped
        self._count[index] = self._count.get(index, 0) + 1
        self._smallest[index] = min(coefficient, self._smallest.get(index, 1.0))
        if self._count[index] % log_every(trainer):
            return
        suffix = f"_{index}" if index else ""
        metrics = {f"stability/clip_coefficient{suffix}": self._smallest.pop(index)}
        if threshold < math.inf:
            metrics[f"stability/clip_threshold{suffix}"] = threshold
        step = logger_step(trainer)
        to_each(trainer.loggers, lambda logger: logger.log_metrics(metrics, step=step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs how many steps were clipped."""
        if self.clipped and trainer.is_global_zero:
            share = self.clipped / self.taken
            log.info(
                "AdaptiveGradientClipping clipped %d of %d steps (%.2g %%)",
                self.clipped,
                self.taken,
                100 * share,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restores the nominal learning rates, as the optimizers may be saved now."""
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).recover()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the optimizers as they were before the fit."""
        if stage == "fit":
            for optimizer in trainer.optimizers:
                learning_rate_multiplier(optimizer).detach()
            self._measured = {}

    def rewindable_state(self) -> dict[str, Any]:
        """Returns what the rule of each optimizer has learnt."""
        return {
            str(index): {"rule": type(rule).__name__, "state": copy.deepcopy(rule.state_dict())}
            for index, rule in self._rules.items()
        }

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state of each rule, if it was saved by a rule of the same class."""
        for index, rule in self._rules.items():
            saved = state.get(str(index))
            if saved is None:
                continue
            if saved["rule"] == type(rule).__name__:
                rule.load_state_dict(copy.deepcopy(saved["state"]))
            else:
                log.info(
                    "%s starts from scratch: the saved state is that of a %s",
                    type(rule).__name__,
                    saved["rule"],
                )

    def state_dict(self) -> dict[str, Any]:
        """Returns what the rules have learnt; options come from the constructor."""
        return self.rewindable_state() if self._rules else dict(self._restored)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts and the optimizers exist."""
        self._restored = state_dict
