"""`QKClip`: rescales the queries and keys of attention heads whose logits grow too large."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import (
    monitor_of,
    require_monitor,
    require_supported_strategy,
)
from lit_stability.detectors.anomaly import require
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.attention_heads import AttentionHeads, HeadWeights, Place
from lit_stability.measurement.attention_monitor import fitting
from lit_stability.measurement.attention_projections import Projection, WeightView
from lit_stability.measurement.compiled import has_compiled_parts
from lit_stability.measurement.norms import DeviceReadings
from lit_stability.measurement.step_stats import ProbeReading, StepStats
from lit_stability.outside import to_each
from lit_stability.policies.qk_clip import qk_clip_factors
from lit_stability.trainer_internals import (
    AroundNextStep,
    is_compiled,
    logger_step,
    sharing,
)
from lit_stability.training_state.skipped_step import is_skipped

log = suite_logger()

_HEAD, _LAYER = "qk_logit_of_head", "qk_logit"


class QKClip(StabilityCallback):
    """Bounds attention logits: after an update, rescales the heads that exceed a threshold.

    On one step in ``every``, the largest absolute logit S of each head is measured: of the whole
    batch, in the forward pass that is made anyway. If S exceeds ``threshold``, the update of that
    step ends with a rescaling of the head's query and key weights, and biases, so that their
    product is multiplied by ``threshold / S``: each by the square root of that, or where heads
    share a key as `lit_stability.policies.qk_clip` says. Nothing else changes; Adam's moments are
    kept as they are. This is the QK-clip of MuonClip (Kimi Team 2025, arXiv 2507.20534), for any
    optimizer. A run in which no head exceeds the threshold is bit-identical to one without this
    callback.

    The rescaling is a part of the optimizer's step: a skipped step has none, a rollback undoes it,
    and steps that are replayed repeat it. With several ranks, S is the largest of all ranks, from
    numbers that travel with those of the other probes on such steps.

    The weights of each head are found on the first step that is measured, by the gradients of its
    queries and keys: projections may be separate, fused, transposed or interleaved, and followed by
    rotary embeddings. For what counts as an attention see
    `lit_stability.measurement.attention_heads`. What cannot be rescaled is reported once with the
    reason: queries that are normalised after their projection, computed or frozen weights, keys
    that share rows with values, attentions in a checkpoint with ``use_reentrant=True``. Weights
    that are used elsewhere as well are not noticed. A model with compiled parts is not measured,
    which is reported too. With gradient accumulation the first batch of the window is measured; in
    manual optimization, what runs before the first backward.

    On a byte GPT of 10 M parameters, one CPU thread, a measured step took 4 % more processor time
    (median of 15 pairs of steps), and the first, which finds the weights, about two steps.

    Metrics logged on the steps that are measured, to every logger:

    * ``stability/qk_logit/MODULE``: largest absolute logit there, after scaling, without masked
      ones; where a softmax is applied to a product by hand, a bias is included.
    * ``stability/qk_clipped_heads``: heads that were rescaled in this step.

    The console reports the first rescaling and, at the end of the fit, their number and layers.

    Args:
        threshold: largest absolute logit that is left as it is; 100 in the paper. It is no tuning
            of a healthy run: the byte-level models of `benchmarks` stay below 50.
        every: optimizer steps (Lightning's ``global_step``) between measurements. Logits that grow
            fast need 1, as in the paper; in `benchmarks.qk_clip` 5 was nearly as good, 20 too few.
        modules: glob of module names, or several; what is inside a matching module is included.

    Raises:
        ValueError: if an argument is out of its range; at `setup` without a `GradientMonitor`
            before it; at the start of the fit if a glob matches no module.
        RuntimeError: at `setup`, under a strategy that shards weights or is not supported.

    >>> from lit_stability import stability_callbacks
    >>> callbacks = [*stability_callbacks(), QKClip(threshold=50.0)]
    """

    ignores_skipped_steps = True

    def __init__(
        self, threshold: float = 100.0, *, every: int = 1, modules: str | Sequence[str] = "*"
    ) -> None:
        require(0 < threshold < math.inf, "threshold", threshold, "greater than 0 and finite")
        require(every >= 1, "every", every, "at least 1")
        self.threshold, self.every = threshold, every
        self.modules = modules if isinstance(modules, str) else list(modules)
        self.rescaled: dict[str, int] = {}
        """For each module the number of heads that were rescaled, once for each time."""
        self.steps = 0
        """Steps in which any head was rescaled."""
        self._step = -1
        """Last step that was taken, and not skipped."""
        self._reported: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._fitting: frozenset[str] = frozenset()
        self._heads: dict[Place, HeadWeights] = {}
        self._names: dict[int, str] = {}
        self._due = self._requested = self._off = False
        self._now = 0
        """Step of the present batch."""
        self._retrace = True
        self._agreed = True
        self._watch: AttentionHeads | None = None
        self._around: AroundNextStep | None = None
        self._pending: dict[Place, int] = {}
        self._factors: dict[tuple[object, ...], tuple[WeightView, Tensor]] = {}
        self._hooked: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []

    def _outside_a_fit(self) -> dict[str, Any]:
        fresh = QKClip(self.threshold)
        kept = ("threshold", "every", "modules", "rescaled", "steps", "_step", "_reported")
        return {name: value for name, value in vars(fresh).items() if name not in kept}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a trainer without a `GradientMonitor`, or whose ranks hold parts of weights."""
        if stage != "fit":
            return
        require_monitor(trainer, self)
        require_supported_strategy(trainer, self)
        if sharing(trainer) == "shards":
            raise RuntimeError(
                f"QKClip does not support {type(trainer.strategy).__name__}: it rescales whole "
                "heads, and each rank holds only a part of the weights. Train with DDP, or bound "
                "the logits in the model, by a norm of queries and keys"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the optimizers before others do, for which a rescaling is a part of the step."""
        self._reset()
        self._follow(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the globs match modules, now that all modules exist."""
        self._fitting = fitting(pl_module, self.modules)
        self._step = min(self._step, trainer.global_step)
        if is_compiled(pl_module) or has_compiled_parts(pl_module):
            self._off = True
            self._warn_once("is off: it cannot see into compiled parts of the model")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts to watch the next forward pass, if this step is due."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._stop()
        self._follow(trainer)
        self._factors = {}
        # With several optimizers global_step may jump over the step that is due.
        step, self._now = trainer.global_step, trainer.global_step
        reached = step % self.every == 0 or step // self.every > self._step // self.every
        self._due = not self._off and (self._due or reached)
        if self._due:
            watch = AttentionHeads(pl_module, self._fitting, self._heads, trace=self._retrace)
            self._watch = watch
            self._around = AroundNextStep(trainer, lambda: watch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Stops watching if the backward pass runs inside ``training_step``."""
        if self._watch is not None:
            self._watch.stop()

    def rank_flag(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Returns the number of attentions whose weights this rank knows."""
        return float(len(self._heads))

    def on_rank_flags(
        self, trainer: Trainer, pl_module: LightningModule, flags: Sequence[float]
    ) -> None:
        """Learns whether all ranks know the same attentions; else none rescales."""
        self._agreed = len(set(flags)) == 1

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | DeviceReadings | None:
        """Returns the logits of this step; None, on all ranks, if the step is not measured."""
        self._requested, self._due = self._due, False
        if not self._requested:
            return None
        watch, self._watch = self._watch, None
        if watch is None:
            return []
        self._check(trainer, pl_module, watch)
        logits = {place: watch.logits[place] for place in watch.logits if place in self._heads}
        if not logits:
            return []
        device = next(iter(logits.values())).device
        numbers = torch.cat([each.to(device) for each in logits.values()])
        counts = {place: len(each) for place, each in logits.items()}
        return DeviceReadings(numbers, lambda host: _readings(counts, host))

    def _check(self, trainer: Trainer, pl_module: LightningModule, watch: AttentionHeads) -> None:
        """Reports the attentions that cannot be rescaled, and forgets those of frozen weights."""
        held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        self._retrace = any(each.for_now for each in watch.failed.values())
        for place, heads in list(self._heads.items()):
            views = (*heads.query.weights, *heads.key.weights)
            if any(id(view.parameter) not in held for view in views):
                del self._heads[place]
                self._warn_once(_cannot(place, "its weights are trained by no optimizer"))
        for place, reason in watch.failed.items():
            if not reason.for_now:
                self._warn_once(_cannot(place, str(reason)))
        if not watch.logits and not watch.failed:
            self._warn_once(f"does nothing: no attention ran in modules={self.modules!r}")

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Computes the factors of the heads that exceed the threshold."""
        if not self._requested:
            return
        self._requested = False
        logits: dict[Place, list[float]] = {}
        for reading in stats.readings:
            if reading.quantity == _HEAD:
                path, number, _ = reading.where.rsplit("#", 2)
                logits.setdefault((path, int(number)), []).append(reading.value)
        self._pending = {p: n for p, each in logits.items() if (n := self._exceeding(each))}
        if not self._pending:
            self._log(trainer, 0)
        elif not self._agreed:
            self._pending = {}
            self._warn_once("rescales nothing while ranks know different attentions")
        else:
            self._factors = {}
            for place in self._pending:
                self._add_factors(self._heads[place], logits[place])

    def _exceeding(self, logits: Sequence[float]) -> int:
        return sum(self.threshold < each < math.inf for each in logits)

    def _add_factors(self, heads: HeadWeights, logits: Sequence[float]) -> None:
        factors = qk_clip_factors(logits, heads.query_groups, heads.key_groups, self.threshold)
        each = len(heads.query_groups) // len(heads.key.rows)
        self._add(heads.query, heads.query_groups, factors[0])
        self._add(heads.key, heads.key_groups[::each], factors[1])

    def _add(
        self, projection: Projection, groups: Sequence[int], factors: Mapping[int, float]
    ) -> None:
        """Adds factors by row; weights that attentions share get the smallest."""
        by_head = torch.tensor([factors[group] for group in groups])
        own = torch.where(projection.rows, by_head[:, None], 1.0).amin(0)
        for view in projection.weights:
            _, before = self._factors.get(view.key, (view, own))
            self._factors[view.key] = view, torch.minimum(before, own)

    def _follow(self, trainer: Trainer) -> None:
        """Hooks the optimizers, again if the program has replaced them."""
        if self._hooked == trainer.optimizers:
            return
        self._unhook()
        self._hooked = list(trainer.optimizers)
        self._handles = [
            o.register_step_post_hook(lambda o, *_: self._updated(trainer, o)) for o in self._hooked
        ]

    def _updated(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Rescales what this optimizer has updated."""
        if is_skipped(optimizer):
            return
        self._step = self._now
        if not self._factors:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = [key for key, (view, _) in self._factors.items() if id(view.parameter) in held]
        for key in own:
            view, factors = self._factors.pop(key)
            view.scale(factors)
        if own:
            monitor_of(trainer).weights_rescaled()
            pending, self._pending = self._pending, {}
            self._count(trainer, pending)

    def _count(self, trainer: Trainer, pending: Mapping[Place, int]) -> None:
        if not pending:
            return
        if not self.rescaled and trainer.is_global_zero:
            first = ", ".join(dict.fromkeys(path or "the model" for path, _ in pending))
            log.info(
                "step %d: QKClip rescaled %d attention heads of %s with logits above %g",
                self._step,
                sum(pending.values()),
                first,
                self.threshold,
            )
        self.steps += 1
        for (path, _), heads in pending.items():
            self.rescaled[path] = self.rescaled.get(path, 0) + heads
        self._log(trainer, sum(pending.values()))

    @staticmethod
    def _log(trainer: Trainer, heads: int) -> None:
        metrics, step = {"stability/qk_clipped_heads": float(heads)}, logger_step(trainer)
        to_each(trainer.loggers, lambda logger: logger.log_metrics(metrics, step=step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs how often heads were rescaled, and in which layers."""
        if self.rescaled and trainer.is_global_zero:
            layers = ", ".join(f"{path or 'the model'} ({n})" for path, n in self.rescaled.items())
            log.info("QKClip rescaled heads in %d steps: %s", self.steps, layers)

    def on_precision_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the weights of the heads: they may be other tensors now."""
        self._heads, self._retrace = {}, True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Removes what watches the forward pass and the optimizers."""
        self._stop()
        self._unhook()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what watches the forward pass and the optimizers."""
        if stage == "fit":
            self._stop()
            self._unhook()
            self._reset()

    def _stop(self) -> None:
        if self._around is not None:
            self._around.remove()
        self._around = self._watch = None

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []

    def _warn_once(self, problem: str) -> None:
        if problem not in self._reported:
            self._reported.add(problem)
            log.warning("QKClip %s", problem)

    def rewindable_state(self) -> dict[str, Any]:
        """Returns which step came last, on which it depends what step is measured next."""
        return {"step": self._step, "steps": self.steps, "rescaled": dict(self.rescaled)}

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rewindable_state` returned."""
        self._step, self.steps = int(state["step"]), int(state["steps"])
        self.rescaled = {str(path): int(n) for path, n in state["rescaled"].items()}
        self._factors, self._pending = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts of rescalings, and which step came last."""
        return self.rewindable_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.load_rewindable_state(state_dict)


def _cannot(place: Place, reason: str) -> str:
    path, number = place
    which = f" (attention {number + 1} there)" if number else ""
    return f"cannot rescale {path or 'the model'}{which}: {reason}"


def _readings(counts: Mapping[Place, int], numbers: Sequence[float]) -> list[ProbeReading]:
    """Returns the largest logit of each module for the loggers, and that of each head."""
    layers: dict[str, float] = {}
    heads, start = [], 0
    for (path, number), count in counts.items():
        own = numbers[start : start + count]
        start += count
        largest = max(own, key=lambda x: math.inf if math.isnan(x) else x)
        layers[path] = max(layers.get(path, 0.0), largest)
        heads += [
            ProbeReading(_HEAD, f"{path}#{number}#{i}", value, largest=True, logged=False)
            for i, value in enumerate(own)
        ]
    return [ProbeReading(_LAYER, path, x, largest=True) for path, x in layers.items()] + heads
