"""`AdaptiveGradientClipping`: clips each step to what a rule says, from the norm already measured.

May import Lightning.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import LBFGS, Optimizer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor, require_supported_strategy
from lit_stability.measurement.step_stats import StepStats
from lit_stability.policies.clip_rules import ClipRule, CutsLearningRate, PercentileClip
from lit_stability.trainer_internals import is_skipped, log_every, logger_step
from lit_stability.training_state.gradient_clipping import clip_step
from lit_stability.training_state.lr_multiplier import learning_rate_multiplier

log = logging.getLogger("lightning.pytorch.lit_stability")

_OWNER = "clipping"


class AdaptiveGradientClipping(StabilityCallback):
    """Clips the gradients of each optimizer to a norm that a rule chooses step by step.

    A step is clipped in place just before its update, from the norm that `GradientMonitor` has
    measured: accumulated, unscaled, of all ranks together. The rule learns from each step that is
    taken, also one that an incident was opened for if nobody vetoed it; never from one that was
    vetoed or whose norm is not finite. A norm that is not finite is not clipped: nothing would
    mend it, and a responder such as `AutoRollback` is what it needs. With a rule that is never
    reached the run is bit-identical to one without.

    A clip that `AutoRollback` has tightened holds as well: the smaller threshold of both wins, and
    the learning-rate factors of both multiply. ``Trainer(gradient_clip_val=...)`` clips afterwards
    what is left by then. What a rule has learnt is part of a checkpoint and of the snapshots that
    a rollback goes back to; every optimizer has a copy of the rule to itself.

    Metrics recorded, every ``trainer.log_every_n_steps`` steps that are taken, to every logger:

    * ``stability/clip_threshold``: the norm that this step was clipped to, or would have been.
    * ``stability/clip_coefficient``: smallest number that measured gradients were multiplied by
      since it was recorded last, in (0, 1]; 1 where nothing was clipped.

    Both are absent for a step whose norm is not finite. With several optimizers, those of the
    second carry ``_1`` and so on. One line on the console says when a rule has lowered the
    learning rate and when it is back, one at the end of the fit how many steps were clipped.

    Args:
        rule: from `lit_stability.policies.clip_rules`, or one of your own; None for
        `PercentileClip`.

    Raises:
        ValueError: if the rule is none; at ``setup``, without a `GradientMonitor` before it; at the
            start of the training with `LBFGS`, whose gradients after the first of a step are not
            measured.
        RuntimeError: at ``setup``, under a strategy that was not tried.
    """

    ignores_skipped_steps = True

    def __init__(self, *, rule: ClipRule | None = None) -> None:
        rule = PercentileClip() if rule is None else rule
        if isinstance(rule, type) or not isinstance(rule, ClipRule):
            raise ValueError(
                "rule must be an object, as lit_stability.policies.clip_rules.PercentileClip(), "
                f"with threshold, update, state_dict and load_state_dict, got {rule!r}"
            )
        self.rule = rule
        """As given: it learns nothing itself, the optimizers have copies."""
        self.taken = 0
        """Steps of this fit, or of the last one, that were taken with a finite norm."""
        self.clipped = 0
        """Those of them that were clipped."""
        self._rules: dict[int, ClipRule] = {}
        self._cutting: dict[int, CutsLearningRate] = {}
        """Those of the rules that lower the learning rate as well."""
        self._restored: Mapping[str, Any] = {}
        self._measured: dict[int, StepStats] = {}
        self._smallest: dict[int, float] = {}
        """Smallest coefficient of each optimizer since it was logged."""
        self._count: dict[int, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit":
            require_monitor(trainer, self)
            require_supported_strategy(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give every optimizer a rule, with what was learnt before a restart."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    "AdaptiveGradientClipping cannot clip an LBFGS optimizer: of the gradients "
                    "that it asks for in one step only the first are measured; use "
                    "Trainer(gradient_clip_val=...)"
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
        """Put the learning rate in force that the rules ask for whatever comes."""
        for index, rule in self._cutting.items():
            self._scale(trainer, trainer.optimizers[index], rule.lr_factor())

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Keep the norm until it is known whether the step is vetoed."""
        self._measured[stats.optimizer] = stats

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip, and learn: whoever had something against the step has vetoed it by now."""
        index = next(i for i, o in enumerate(trainer.optimizers) if o is optimizer)
        stats = self._measured.pop(index, None)
        if stats is None or is_skipped(optimizer) or not stats.finite_gradients:
            return
        rule = self._rules[index]
        threshold = rule.threshold(stats.grad_norm)
        coefficient = clip_step(optimizer, stats, threshold)
        if index in self._cutting:
            factor = self._cutting[index].lr_factor(stats.grad_norm)
            self._scale(trainer, optimizer, factor, stats)
        rule.update(stats.grad_norm)
        self._record(trainer, index, threshold, coefficient, clipped=stats.grad_norm > threshold)

    def _scale(
        self, trainer: Trainer, optimizer: Optimizer, factor: float, stats: StepStats | None = None
    ) -> None:
        scale, groups = learning_rate_multiplier(optimizer), len(optimizer.param_groups)
        before = min(scale.held_by(_OWNER), default=1.0)
        if factor == before:
            return
        scale.set([factor] * groups, _OWNER)
        line = f"learning rate x{factor:.3g}" if factor < 1 else "learning rate as scheduled again"
        if stats is not None:
            line = f"gradient norm {stats.grad_norm:.4g}: {line}"
        if trainer.is_global_zero:
            log.info("step %d: %s", trainer.global_step, line)

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
        metrics = {
            f"stability/clip_threshold{suffix}": threshold,
            f"stability/clip_coefficient{suffix}": self._smallest.pop(index),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=logger_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell how much was clipped."""
        if self.clipped and trainer.is_global_zero:
            share = self.clipped / self.taken
            log.info("clipped %d of %d steps (%.2g %%)", self.clipped, self.taken, 100 * share)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no scaled learning rate behind in an optimizer that somebody may save now."""
        for optimizer in trainer.optimizers:
            learning_rate_multiplier(optimizer).recover()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers as they were found."""
        if stage == "fit":
            for optimizer in trainer.optimizers:
                learning_rate_multiplier(optimizer).detach()
            self._measured = {}

    def rewindable_state(self) -> dict[str, Any]:
        """What the rule of each optimizer has learnt."""
        return {
            str(index): {"rule": type(rule).__name__, "state": copy.deepcopy(rule.state_dict())}
            for index, rule in self._rules.items()
        }

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Put it back, where it was learnt by a rule of that kind."""
        for index, rule in self._rules.items():
            saved = state.get(str(index))
            if saved is None:
                continue
            if saved["rule"] == type(rule).__name__:
                rule.load_state_dict(copy.deepcopy(saved["state"]))
            else:
                log.info("%s learns anew: the state is a %s's", type(rule).__name__, saved["rule"])

    def state_dict(self) -> dict[str, Any]:
        """What the rules have learnt; the options come from the constructor."""
        return self.rewindable_state() if self._rules else dict(self._restored)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the optimizers are there."""
        self._restored = state_dict
