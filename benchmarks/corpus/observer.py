"""Observes from outside what a protection does to the updates of a run.

Imports Lightning and torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

PLAIN_NORM = 1.0
"""Global norm of plain clipping, which most recipes use."""
EXACT = 1e-3
"""Relative difference up to which two gradients count as equal."""

Change = Literal["none", "plain clipping", "other"]


class Observer(Callback):
    """Records the losses of a run, and the batches whose update was changed.

    The gradient after the backward pass, before any protection, is compared with the one that the
    optimizer has used. Both are read and never written. Put it before the protection's callbacks.
    """

    def __init__(self) -> None:
        self.batch = -1
        self.losses: list[float] = []
        """Loss of each batch; NaN where `training_step` returned none."""
        self.clipped: list[int] = []
        """Batches whose gradient was only clipped to a global norm of 1.0."""
        self.changed: list[int] = []
        """Batches whose gradient was changed otherwise, or whose update was skipped."""
        self._gradients: dict[Tensor, Tensor] = {}
        self._due = False
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observes the updates of each optimizer."""
        # The closure computes the gradients within the step, so they are complete only after it.
        self._hooks = [o.register_step_post_hook(self._after_update) for o in trainer.optimizers]

    def on_train_batch_start(self, *args: Any) -> None:
        """Begins a batch."""
        self.batch += 1
        self._due = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the gradients, without the loss scale."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._gradients = {
            p: _dense(p.grad) / scale for p in pl_module.parameters() if p.grad is not None
        }

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Notes that an update is due."""
        self._due = True

    def _after_update(self, optimizer: Optimizer, *args: Any) -> None:
        self._due = False
        change = change_of(self._gradients, optimizer)
        batches = {"plain clipping": self.clipped, "other": self.changed}.get(change)
        if batches is not None and self.batch not in batches[-1:]:
            batches.append(self.batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Records the loss, and an update that was due and not made."""
        self.losses.append(_loss(outputs))
        if self._due:
            self.changed.append(self.batch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def change_of(before: Mapping[Tensor, Tensor], optimizer: Optimizer) -> Change:
    """Returns how the gradients of an optimizer differ from those of the backward pass.

    Args:
        before: Gradient of each parameter after the backward pass.
        optimizer: Optimizer after its step, with the gradients that it has used.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], 0.1)
    >>> before = {weight: torch.tensor([3.0, 4.0])}
    >>> for gradient in ([3.0, 4.0], [0.6, 0.8], [0.3, 0.4]):
    ...     weight.grad = torch.tensor(gradient)
    ...     print(change_of(before, optimizer))
    none
    plain clipping
    other
    >>> weight.grad = torch.tensor([3e-5, 4e-5])
    >>> change_of({weight: torch.tensor([3e-4, 4e-4])}, optimizer)  # the norm is below 1.0
    'other'
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p in before]
    if not parameters:
        return "none"
    old = torch.cat([before[p].flatten() for p in parameters])
    used = [torch.zeros_like(p) if p.grad is None else _dense(p.grad) for p in parameters]
    new = torch.cat([gradient.flatten() for gradient in used])
    if not bool(old.isfinite().all()):
        return "other" if bool(new.isfinite().all()) else "none"
    norm = float(old.norm())
    if float((new - old).norm()) <= EXACT * norm:
        return "none"
    if norm <= PLAIN_NORM:
        return "other"
    plain = old * (PLAIN_NORM / norm)
    return "plain clipping" if float((new - plain).norm()) <= EXACT * PLAIN_NORM else "other"


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach().clone()


def _loss(outputs: Any) -> float:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return float("nan") if loss is None else float(loss)
