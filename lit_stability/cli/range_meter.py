"""Measures what a module spans while Lightning trains it, without a single update.

May import Lightning.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.checks.precision_ranges.measure import Probe
from lit_stability.checks.precision_ranges.report import RangeReport


class RangeMeter(StabilityCallback):
    """Runs `batches` training steps in float32, measures, vetoes every update, ends the fit.

    The module is turned into float32 for good, and its BatchNorm statistics move with the batches
    as in training: measure a module that is not needed afterwards. Needs a Trainer of precision
    ``32-true`` on one device, without gradient accumulation.

    Args:
        batches: how many to measure; fewer if the fit is over before.

    Raises:
        ValueError: if `batches` is less than 1.
        RuntimeError: at `setup`, if the Trainer has another precision, more devices or
            accumulates gradients.
    """

    def __init__(self, batches: int = 4) -> None:
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        self.batches = batches
        self.report: RangeReport | None = None
        """What was measured; None before the end of the fit."""
        self._probe: Probe | None = None
        self._attached = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a fit whose gradients would not be those of one batch in float32."""
        found = {
            "precision": (trainer.precision, "32-true"),
            "num_devices": (trainer.num_devices, 1),
            "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        }
        for option, (value, wanted) in found.items():
            if value != wanted:
                raise RuntimeError(f"RangeMeter needs {option}={wanted!r}, got {value!r}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for values that 16 bits do not hold, also of a checkpoint loaded hereafter."""
        pl_module.float()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights, and begin to listen."""
        self._probe = self._attached.enter_context(Probe(pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the batch."""
        self._listening().saw_batch(batch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Measure the loss."""
        self._listening().saw_loss(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients, and take them away: the optimizer leaves all as it is."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._listening().saw_gradients(parameters)
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
        """End the fit when enough was seen."""
        if self._listening().batches >= self.batches:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the report, and take every hook off the module."""
        if self._listening().batches:
            self.report = self._listening().report(_adam_epsilon(trainer.optimizers))
        self._attached.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take every hook off the module."""
        self._attached.close()

    def _listening(self) -> Probe:
        assert self._probe is not None, "Lightning starts training before it trains a batch"
        return self._probe


def _adam_epsilon(optimizers: list[Optimizer]) -> float:
    """Smallest epsilon of any group that has one, or torch's default."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return min((float(group["eps"]) for group in groups if "eps" in group), default=1e-8)
