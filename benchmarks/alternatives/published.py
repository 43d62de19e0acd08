"""Protections from PyPI, adapted to Lightning's loop as their documentation describes.

They are not dependencies: ``make .bench-venv`` installs them next to the project, with the
versions in ``requirements.txt``. A package is imported in `callbacks`, so that a missing or broken
one is listed with its error. Imports Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.alternatives.protection import Protection


class ZClip(Protection):
    """ZClip (arXiv 2504.02507): clips norms 2.5 deviations above the mean, and at 1.0."""

    name = "ZClip"
    package = "zclip"

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        from zclip.zclip_lightning_callback import ZClipLightningCallback

        return [ZClipLightningCallback()]


class AutoClip(Protection):
    """AutoClip (arXiv 2007.14469): clips each parameter at the 0.9 quantile of its past norms."""

    name = "AutoClip"
    package = "autoclip"

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        from autoclip.torch import QuantileClip

        return [_BeforeStep(QuantileClip)]


class _BeforeStep(Callback):
    """Steps a clipper between backward pass and update.

    AutoClip's optimizer wrapper would clip before Lightning's closure computes the gradients.
    """

    def __init__(self, make_clipper: Callable[[Any], Any]) -> None:
        self._make_clipper = make_clipper

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Creates the clipper of the trainable parameters."""
        self._clipper = self._make_clipper([p for p in pl_module.parameters() if p.requires_grad])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clips the gradients."""
        self._clipper.step()


class StabilityGuard(Protection):
    """stabilityguard: skips a step if the norm of a layer is ten times its running mean.

    Uses ``nan_action="rollback"``, which also restores the weights of the previous step; the
    default ``"skip"`` keeps a damaged weight.
    """

    name = "stabilityguard"
    package = "stabilityguard"
    raises_alarms = True

    def __init__(self) -> None:
        self.guards: list[Any] = []

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        from stabilityguard import GuardedOptimizer

        def guard(optimizer: Any, module: LightningModule) -> Any:
            guarded = GuardedOptimizer(
                optimizer, module, nan_action="rollback", log_dir=str(folder), verbose=False
            )
            self.guards.append(guarded)
            return guarded

        return [_GuardOptimizers(guard)]

    def alarms(self) -> Sequence[str]:
        """Returns the spikes of all guarded optimizers."""
        return ["spike"] * sum(guard.total_spikes for guard in self.guards)


class _GuardOptimizers(Callback):
    """Replaces the step of each optimizer by the step of its guard.

    Lightning computes the gradients in a closure passed to the optimizer, and the guard reads them
    before its optimizer's step, so the closure must run first.
    """

    def __init__(self, guard: Callable[[Any, LightningModule], Any]) -> None:
        self._guard = guard

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the guards."""
        for optimizer in trainer.optimizers:
            guard = self._guard(_OriginalStep(optimizer), pl_module)
            optimizer.step = _closure_first(guard)  # type: ignore[method-assign]


class _OriginalStep:
    """Proxy of an optimizer that keeps its original step method."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.step = optimizer.step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _closure_first(guard: Any) -> Callable[..., Any]:
    def step(closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        guard.step(loss=None if loss is None else float(loss))
        return loss

    return step


class Arc(Protection):
    """arc-training: its Lightning callback restores a snapshot and halves the learning rate."""

    name = "arc-training"
    package = "arc-training"
    raises_alarms = True

    def __init__(self) -> None:
        self.callback: Any = None

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        from arc.api.integrations import LightningCallback

        self.callback = LightningCallback(verbose=False)
        return [self.callback]

    def alarms(self) -> Sequence[str]:
        """See `Protection`."""
        controller = getattr(self.callback, "controller", None)
        return [] if controller is None else ["failure"] * int(controller.failures_detected)
