"""Protections from PyPI, each adapted to Lightning's loop as its documentation asks.

None is a dependency: ``make .bench-venv`` installs them beside the project, at the versions of
``requirements.txt``. A package is imported in `callbacks`, so that one that is missing or broken
is listed with its error. May import Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.alternatives.protection import Protection


class ZClip(Protection):
    """ZClip (arXiv 2504.02507): clips what is 2.5 deviations above the mean norm, and at 1.0."""

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
    """Steps a clipper between backward and update.

    Its optimizer wrapper would clip before Lightning's closure has computed the gradients.
    """

    def __init__(self, clipper: Callable[[Any], Any]) -> None:
        self._make = clipper

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the clipper of what trains."""
        self._clipper = self._make([p for p in pl_module.parameters() if p.requires_grad])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip."""
        self._clipper.step()


class StabilityGuard(Protection):
    """stabilityguard: leaves out a step whose norm in some layer is ten times its running mean.

    With ``nan_action="rollback"``, which also puts back the weights of the step before; its default
    ``"skip"`` leaves a damaged weight where it is.
    """

    name = "stabilityguard"
    package = "stabilityguard"
    tells = True

    def __init__(self) -> None:
        self.guards: list[Any] = []

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        from stabilityguard import GuardedOptimizer

        def guard(optimizer: Any, module: LightningModule) -> Any:
            made = GuardedOptimizer(
                optimizer, module, nan_action="rollback", log_dir=str(folder), verbose=False
            )
            self.guards.append(made)
            return made

        return [_Guarded(guard)]

    def alarms(self) -> int:
        """See `Protection`."""
        return sum(guard.total_spikes for guard in self.guards)


class _Guarded(Callback):
    """Puts a guard around the step of each optimizer.

    Lightning computes the gradients in a closure that the optimizer is handed, and the guard looks
    at them before its optimizer's step: so the closure is run first.
    """

    def __init__(self, guard: Callable[[Any, LightningModule], Any]) -> None:
        self._guard = guard

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the guards in place."""
        for optimizer in trainer.optimizers:
            guard = self._guard(_Original(optimizer), pl_module)
            optimizer.step = _closure_first(guard)  # type: ignore[method-assign]


class _Original:
    """An optimizer with the step that it had."""

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
    """arc-training: its Lightning callback, which goes back to a snapshot and halves the rate."""

    name = "arc-training"
    package = "arc-training"
    tells = True

    def __init__(self) -> None:
        self.callback: Any = None

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        from arc.api.integrations import LightningCallback

        self.callback = LightningCallback(verbose=False)
        return [self.callback]

    def alarms(self) -> int:
        """See `Protection`."""
        controller = getattr(self.callback, "controller", None)
        return 0 if controller is None else int(controller.failures_detected)
