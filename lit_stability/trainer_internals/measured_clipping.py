"""Clips with the norm that was measured, where Lightning would compute it a second time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from lit_stability.lightning_choice import LIGHTNING_ROOTS
from lit_stability.lightning_package import LightningModule, Precision, Trainer
from lit_stability.measurement.norms import MeasuredGradients
from lit_stability.trainer_internals.patch import Patch
from lit_stability.trainer_internals.strategies import sharing
from lit_stability.trainer_internals.trainer_view import callbacks_of, clip_norm
from lit_stability.training_state.gradient_clipping import clip_measured

_BEFORE_CLIPPING = (
    "on_before_optimizer_step",
    "on_step_measured",
    "on_healthy_step",
    "on_local_anomaly",
    "on_incident",
    "on_regime_change",
)
"""Hooks that run between the measurement and the clipping."""
_OURS = (*LIGHTNING_ROOTS, "lit_stability")


class MeasuredClipping:
    """Takes over ``Trainer(gradient_clip_val=...)`` for the norm; the results are the same bits.

    It is left to Lightning where something else may write to gradients between measurement and
    clipping: with a hook of the user's in between, an overridden ``configure_gradient_clipping``, a
    precision plugin of another package, or sharded gradients. Clipping by value needs no norm.

    Args:
        trainer: at the start of its fit.
        pl_module: the module in training.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plugin = trainer.precision_plugin
        self._plugin: Any = plugin
        self._clip_anyway: Any = plugin.clip_grad_by_norm
        self._measured: MeasuredGradients | None = None
        self.active = _needs_norm(trainer) and not _may_write(trainer, pl_module)
        """Whether it takes over."""
        self._patch = Patch(plugin, "clip_grad_by_norm", self._clip)
        if self.active:
            self._patch.apply()

    def remove(self) -> None:
        """Leaves the clipping to Lightning."""
        self._measured = None
        self._patch.remove()

    def measured(self, gradients: MeasuredGradients | None) -> None:
        """Records the gradients that are clipped next; None if they cannot be used."""
        self._measured = gradients

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        measured, self._measured = self._measured, None
        parameters = [*self._plugin.main_params(optimizer)]
        if measured is None or not clip_measured(measured, parameters, float(clip_val)):
            self._clip_anyway(optimizer, clip_val)


def _needs_norm(trainer: Trainer) -> bool:
    """Whether Lightning itself clips to a norm, of gradients that one rank holds completely."""
    kind = type(trainer.precision_plugin)
    if kind.clip_grad_by_norm is not Precision.clip_grad_by_norm or not _is_ours(kind):
        return False
    return clip_norm(trainer) is not None and sharing(trainer) != "shards"


def _may_write(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether a hook of somebody else runs between measurement and clipping."""
    return not all(map(_is_ours, _hooks_of([*callbacks_of(trainer), pl_module])))


def _hooks_of(owners: Iterable[Any]) -> list[Any]:
    found = (getattr(each, name, None) for each in owners for name in _BEFORE_CLIPPING)
    return [hook for hook in found if callable(hook)]


def _is_ours(code: Any) -> bool:
    return str(getattr(code, "__module__", "")).split(".")[0] in _OURS
