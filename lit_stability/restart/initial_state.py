"""The state of a module before its first fit, so that a restart can begin from it.

May import torch and torchmetrics, but not Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_stability.training_state.rng import capture_rng, restore_rng


class InitialState:
    """Copies weights and buffers to the CPU, with ``requires_grad``, train modes and RNG states.

    A checkpoint restores most of this, but not train modes (a crash in validation leaves a module
    in ``eval``), parameters frozen in the middle of a step, non-persistent buffers, and metrics
    that hold half an epoch.

    Args:
        module: the module, before its first fit.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._requires_grad: dict[str, bool] = {}
        self._modes: dict[str, bool] = {}
        self._rng = capture_rng()
        self.add(module)

    def add(self, module: nn.Module) -> None:
        """Adds what was created since: layers of ``configure_model``, lazy parameters."""
        for name, tensor in _tensors(module):
            if name not in self._tensors and not is_lazy(tensor) and not tensor.is_meta:
                self._tensors[name] = tensor.detach().cpu().clone()
                self._requires_grad[name] = tensor.requires_grad
        for name, submodule in module.named_modules():
            self._modes.setdefault(name, submodule.training)

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Restores the module in place and clears its gradients; RNG states are unchanged."""
        for name, tensor in _tensors(module):
            tensor.grad = None
            saved = self._tensors.get(name)
            if saved is not None:
                # Through .data, since a precision plugin may have converted the module's dtype.
                tensor.data = saved.to(tensor.device, copy=True)
                if tensor.is_leaf:
                    tensor.requires_grad_(self._requires_grad[name])
        for name, submodule in module.named_modules():
            submodule.training = self._modes.get(name, submodule.training)
            if isinstance(submodule, torchmetrics.Metric):
                submodule.reset()

    def restore_generators(self) -> None:
        """Restores the RNG states, for a fit that starts without a checkpoint."""
        restore_rng(self._rng)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
