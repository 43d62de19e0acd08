"""Measures the magnitudes in a module in a Lightning fit, without updating the weights.

May import Lightning.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.checks.precision_ranges.measure import Probe
from lit_stability.checks.precision_ranges.report import RangeReport
from lit_stability.lightning_package import LightningModule, Trainer


class RangeMeter(StabilityCallback):
    """Measures `batches` training steps in float32, skips every update, then ends the fit.

    The module stays in float32, and its BatchNorm statistics change with the batches as in
    training, so do not train this module afterwards. Needs a Trainer with precision ``32-true`` on
    one device, without gradient accumulation.

    Args:
        batches: Number of batches to measure; fewer if the fit ends earlier.

    Raises:
        ValueError: If `batches` is less than 1.
        RuntimeError: In `setup`, if the Trainer has another precision, more devices, or
            accumulates gradients.
    """

    def __init__(self, batches: int = 4) -> None:
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        self.batches = batches
        self.report: RangeReport | None = None
        """The measurement; None before the end of the fit."""
        self._probe: Probe | None = None
        self._attached = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises an error if the gradients would not be those of one batch in float32."""
        settings = {
            "precision": (trainer.precision, "32-true"),
            "num_devices": (trainer.num_devices, 1),
            "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        }
        for option, (value, wanted) in settings.items():
            if value != wanted:
                raise RuntimeError(f"RangeMeter needs {option}={wanted!r}, got {value!r}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Converts the module to float32, before the weights of a checkpoint are loaded into it."""
        pl_module.float()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the weights, and starts to measure activations."""
        self._probe = self._attached.enter_context(Probe(pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measures the batch."""
        self._active_probe().add_batch(batch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Measures the loss."""
        self._active_probe().add_loss(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measures the gradients, and removes them, so that the optimizer updates nothing."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._active_probe().add_gradients(parameters)
        for parameter in parameters:
            parameter.grad = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends the fit after `batches` batches."""
        if self._active_probe().batches >= self.batches:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Creates the report, and removes all hooks from the module."""
        if self._active_probe().batches:
            self.report = self._active_probe().report(_adam_epsilon(trainer.optimizers))
        self._attached.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Removes all hooks from the module."""
        self._attached.close()

    def _active_probe(self) -> Probe:
        assert self._probe is not None, "Lightning starts training before it trains a batch"
        return self._probe


def _adam_epsilon(optimizers: list[Optimizer]) -> float:
    """Returns the smallest epsilon of all parameter groups, or torch's default."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return min((float(group["eps"]) for group in groups if "eps" in group), default=1e-8)
