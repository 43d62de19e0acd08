"""`AttentionProbe`: how large attention logits are, and whether attention still looks around."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_stability.attention_watch import AttentionWatch, fitting
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.compiled import has_compiled_parts
from lit_stability.detectors.anomaly import require
from lit_stability.stats import ProbeReading
from lit_stability.trainer_state import AroundNextStep

log = logging.getLogger("lightning.pytorch.lit_stability")


class AttentionProbe(Callback):
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
    is not seen: `lit_stability.attention_watch`. In a model with compiled parts nothing is
    measured, and it is said once. With gradient accumulation the first batch of the window is
    measured, in manual optimization what comes before the first backward pass.

    Args:
        modules: glob of module names, or several, with all that is inside a module that fits.
        every: optimizer steps (Lightning's ``global_step``) between measurements.

    Raises:
        ValueError: if `every` is less than 1; at `setup` without a `GradientMonitor` before it; at
            the start of the fit where a glob fits no module.
    """

    def __init__(self, modules: str | Sequence[str] = "*", *, every: int = 50) -> None:
        require(every >= 1, "every", every, "at least 1")
        self.modules = modules if isinstance(modules, str) else list(modules)
        self.every = every
        self._blind = False
        self._told = False
        self._watch: AttentionWatch | None = None
        self._around: AroundNextStep | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the modules, now that all are there."""
        fitting(pl_module, self.modules)
        self._told = False
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None
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
        if trainer.global_step % self.every == 0 and not self._blind:
            self._watch = AttentionWatch(pl_module, self.modules)
            watch = self._watch
            self._around = AroundNextStep(trainer, lambda: watch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """End the watch where the backward pass runs inside of ``training_step``."""
        if self._watch is not None:
            self._watch.stop()

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | None:
        """What the step at hand has shown, once; None if it was not watched."""
        watch, self._watch = self._watch, None
        if watch is None:
            return None
        found = watch.readings()
        if watch.error is not None:
            self._say(f"did not measure an attention ({watch.error})")
        elif not found:
            self._say(f"measures nothing: no attention was seen in modules={self.modules!r}")
        return found

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
