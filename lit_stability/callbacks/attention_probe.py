"""`AttentionProbe`: how large attention logits are, and whether attention still looks around."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.detectors.anomaly import require
from lit_stability.measurement.attention_monitor import LOGIT, AttentionMonitor, fitting
from lit_stability.measurement.compiled import has_compiled_parts
from lit_stability.measurement.norms import DeviceReadings
from lit_stability.measurement.step_stats import ProbeReading, StepStats
from lit_stability.trainer_internals import AroundNextStep, callbacks_of, is_compiled, sharing

log = logging.getLogger("lightning.pytorch.lit_stability")

_LOOKS, _RARELY = 2, 20
"""Measurements in a row without an attention, after which few are made: one in so many."""


class AttentionProbe(StabilityCallback):
    """Measures, on one step in `every`, what every attention of the model looks like.

    While the forward pass of such a step runs, the kernels it calls are watched; an attention is
    measured from its first sequence, all heads, at most 64 queries. Nothing is installed on other
    steps, nor in any backward pass, and a run is bit-identical to one without the probe.

    The readings go into ``StepStats.readings``, where `AttentionLogits`, one of the monitor's
    default detectors, judges them; over several ranks they are the mean. Each is given for the
    innermost module that runs the attention:

    * ``attention_logit``: largest absolute logit, after scaling, masked ones left out.
    * ``attention_entropy``: mean entropy of the rows, as a share of ``log(keys a row may see)``,
      in [0, 1]; absent where all rows see one key.

    Both are absent where no attention ran. What is seen: `scaled_dot_product_attention` with any
    backend, `torch.nn.MultiheadAttention`, and a softmax over a product of queries and keys. What
    is not seen: `lit_stability.measurement.attention_monitor`. In a model with compiled parts
    nothing is measured, and it is said once. With gradient accumulation the first batch of the
    window is measured, in manual optimization what comes before the first backward pass.

    Where two measurements in a row have found no attention, on any rank, it looks on one in twenty
    of its turns only, until there is one: some begin late. The one in `stability_callbacks` is
    ``quiet``: whoever has not asked for it is not told that there is nothing to measure.

    Args:
        modules: glob of module names, or several, with all that is inside a module that fits.
        every: optimizer steps (Lightning's ``global_step``) between measurements.
        quiet: say nothing where nothing can be measured, and measure nothing beside an
            `AttentionProbe` that is not quiet, nor under a strategy that it was never run under.

    Raises:
        ValueError: if `every` is less than 1; at `setup` without a `GradientMonitor` before it; at
            the start of the fit where a glob fits no module.
    """

    def __init__(
        self, modules: str | Sequence[str] = "*", *, every: int = 50, quiet: bool = False
    ) -> None:
        require(every >= 1, "every", every, "at least 1")
        self.modules = modules if isinstance(modules, str) else list(modules)
        self.every, self.quiet = every, quiet
        self._told = quiet
        self._blind = self._off = self._due = self._asked = False
        self._empty = 0
        """Looks in a row without an attention."""
        self._step = 0
        self._watch: AttentionMonitor | None = None
        self._around: AroundNextStep | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the modules, now that all are there."""
        fitting(pl_module, self.modules)
        self._told, self._due, self._asked = self.quiet, False, False
        self._step = trainer.global_step
        self._empty, self._off = 0, self.quiet and _is_left_to_others(trainer)
        compiled = is_compiled(pl_module)
        self._blind = compiled or has_compiled_parts(pl_module)
        if self._blind:
            self._say("measures nothing: the model has compiled parts, which cannot be seen into")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the coming forward pass watched, if it is its turn."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._forget()
        # Several optimizers may step over the number that is due; a window that brings no optimizer
        # step leaves its turn to the next.
        before, self._step = self._step, trainer.global_step
        every = self.every if self._empty < _LOOKS else self.every * _RARELY
        comes = self._step % every == 0 or self._step // every > before // every
        self._due = not self._off and (self._due or comes)
        if self._due and not self._blind:
            self._watch = watch = AttentionMonitor(pl_module, self.modules)
            self._around = AroundNextStep(trainer, lambda: watch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """End the watch where the backward pass runs inside of ``training_step``."""
        if self._watch is not None:
            self._watch.stop()

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | DeviceReadings | None:
        """What the step at hand has shown, once; None if it is not its turn, on all ranks alike."""
        self._asked, self._due = self._due, False
        if not self._asked:
            return None
        watch, self._watch = self._watch, None
        if watch is None:
            return []
        found = watch.unread()
        if watch.error is not None:
            self._say(f"did not measure an attention ({watch.error})")
        elif found is None:
            self._say(f"measures nothing: no attention was seen in modules={self.modules!r}")
        return [] if found is None else found

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """See how soon to look again, by what all ranks have found."""
        if self._asked:
            self._asked = False
            self._empty = 0 if stats.readings_of(LOGIT) else self._empty + 1

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing behind."""
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._forget()

    def _forget(self) -> None:
        if self._around is not None:
            self._around.remove()
        self._around = self._watch = None

    def _say(self, what: str) -> None:
        if not self._told:
            self._told = True
            log.warning("AttentionProbe %s", what)


def _is_left_to_others(trainer: Trainer) -> bool:
    """Whether somebody has chosen what to measure, or has a strategy that nobody has tried."""
    probes = [c for c in callbacks_of(trainer) if isinstance(c, AttentionProbe)]
    return sharing(trainer) == "untried" or not all(probe.quiet for probe in probes)
