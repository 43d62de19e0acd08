"""`AttentionProbe`: measures the size of attention logits and the entropy of attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import require_monitor
from lit_stability.detectors.anomaly import require
from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import LightningModule, Trainer
from lit_stability.measurement.attention_monitor import LOGIT, AttentionMonitor, fitting
from lit_stability.measurement.compiled import has_compiled_parts
from lit_stability.measurement.norms import DeviceReadings
from lit_stability.measurement.step_stats import ProbeReading, StepStats
from lit_stability.trainer_internals import AroundNextStep, callbacks_of, is_compiled, sharing

log = suite_logger()

_EMPTY_LIMIT, _SLOWDOWN = 2, 20
"""After this many measurements in a row without attention, only one in `_SLOWDOWN` is made."""


class AttentionProbe(StabilityCallback):
    """Measures every attention of the model, on one step in `every`.

    On such a step the probe records the kernels that the forward pass calls. Each attention is
    measured on its first sequence, all heads, at most 64 queries. Nothing is installed on other
    steps, or in any backward pass. A run is bit-identical to one without the probe.

    The readings are stored in ``StepStats.readings``, where `AttentionLogits`, one of the monitor's
    default detectors, checks them; over several ranks they are averaged. Each reading belongs to
    the innermost module that runs the attention:

    * ``attention_logit``: largest absolute logit, after scaling, without masked logits.
    * ``attention_entropy``: mean entropy of the rows, divided by ``log(keys a row may see)``,
      in [0, 1]; absent where all rows see one key.

    Both are absent if no attention ran. The probe recognizes `scaled_dot_product_attention` with
    any backend, `torch.nn.MultiheadAttention`, and a softmax over a product of queries and keys;
    for what it does not recognize see `lit_stability.measurement.attention_monitor`. A model with
    compiled parts is not measured, and the probe warns once. With gradient accumulation the first
    batch of the window is measured; in manual optimization, what runs before the first backward.

    After two measurements in a row without attention on any rank, the probe measures only one in
    twenty of its steps until it finds one, because some models use attention only later. The probe
    in `stability_callbacks` is ``quiet``, so that models without attention cause no warning.

    >>> from lit_stability import stability_callbacks
    >>> suite = stability_callbacks(attention=dict(modules="encoder.*", every=20, quiet=False))

    Args:
        modules: glob of module names, or several; what is inside a matching module is included.
        every: optimizer steps (Lightning's ``global_step``) between measurements.
        quiet: do not warn if nothing can be measured, and measure nothing if there is an
            `AttentionProbe` that is not quiet, or under a strategy that is not supported.

    Raises:
        ValueError: if `every` is less than 1; at `setup` without a `GradientMonitor` before it; at
            the start of the fit if a glob matches no module.
    """

    def __init__(
        self, modules: str | Sequence[str] = "*", *, every: int = 50, quiet: bool = False
    ) -> None:
        require(every >= 1, "every", every, "at least 1")
        self.modules = modules if isinstance(modules, str) else list(modules)
        self.every, self.quiet = every, quiet
        self._warned = quiet
        self._compiled = self._disabled = self._due = self._requested = False
        self._empty_in_a_row = 0
        """Measurements in a row without attention."""
        self._step = 0
        self._recorder: AttentionMonitor | None = None
        self._around: AroundNextStep | None = None

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_recorder": None, "_around": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a trainer without a `GradientMonitor` before this callback."""
        if stage == "fit":
            require_monitor(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the globs match modules, now that all modules exist."""
        fitting(pl_module, self.modules)
        self._warned, self._due, self._requested = self.quiet, False, False
        self._step = trainer.global_step
        self._empty_in_a_row, self._disabled = 0, self.quiet and _stays_off(trainer)
        compiled = is_compiled(pl_module)
        self._compiled = compiled or has_compiled_parts(pl_module)
        if self._compiled:
            self._warn_once("measures nothing: it cannot see into compiled parts of the model")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts recording the next forward pass, if this step is due."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._stop()
        # With several optimizers global_step may jump over the step that is due. If a window ends
        # without an optimizer step, the next window is measured instead.
        previous, self._step = self._step, trainer.global_step
        every = self.every if self._empty_in_a_row < _EMPTY_LIMIT else self.every * _SLOWDOWN
        reached = self._step % every == 0 or self._step // every > previous // every
        self._due = not self._disabled and (self._due or reached)
        if self._due and not self._compiled:
            self._recorder = recorder = AttentionMonitor(pl_module, self.modules)
            self._around = AroundNextStep(trainer, lambda: recorder)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Stops recording if the backward pass runs inside ``training_step``."""
        if self._recorder is not None:
            self._recorder.stop()

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | DeviceReadings | None:
        """Returns the readings of this step; None, on all ranks, if the step is not measured."""
        self._requested, self._due = self._due, False
        if not self._requested:
            return None
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return []
        readings = recorder.unread()
        if recorder.error is not None:
            self._warn_once(f"could not measure an attention ({recorder.error})")
        elif readings is None:
            self._warn_once(f"measures nothing: no attention ran in modules={self.modules!r}")
        return [] if readings is None else readings

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Counts measurements without attention, from what all ranks found together."""
        if self._requested:
            self._requested = False
            self._empty_in_a_row = 0 if stats.readings_of(LOGIT) else self._empty_in_a_row + 1

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Removes what records the forward pass."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what records the forward pass."""
        self._stop()

    def _stop(self) -> None:
        if self._around is not None:
            self._around.remove()
        self._around = self._recorder = None

    def _warn_once(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("AttentionProbe %s", problem)


def _stays_off(trainer: Trainer) -> bool:
    """Whether a quiet probe stays off: the user has added one, or the strategy is unsupported."""
    probes = [c for c in callbacks_of(trainer) if isinstance(c, AttentionProbe)]
    return sharing(trainer) == "untried" or not all(probe.quiet for probe in probes)
