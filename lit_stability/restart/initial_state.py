"""How a module stood before the first fit, so that each further one can begin there too.

May import torch and torchmetrics; knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_stability.training_state.rng import capture_rng, restore_rng


class InitialState:
    """Weights and buffers on the CPU, modes, which parameters learn, the generators' states.

    A checkpoint brings most of this back, but not what it leaves out: modes (a crash in validation
    leaves a module in ``eval``), parameters frozen in mid-step, buffers that are not persistent,
    metrics that have half an epoch in them.

    Args:
        module: before its first fit.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._learns: dict[str, bool] = {}
        self._modes: dict[str, bool] = {}
        self._rng = capture_rng()
        self.add(module)

    def add(self, module: nn.Module) -> None:
        """Take what has come into being since: layers of ``configure_model``, lazy parameters."""
        for name, tensor in _tensors(module):
            if name not in self._tensors and not is_lazy(tensor) and not tensor.is_meta:
                self._tensors[name] = tensor.detach().cpu().clone()
                self._learns[name] = tensor.requires_grad
        for name, each in module.named_modules():
            self._modes.setdefault(name, each.training)

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Put it all back in place, without gradients; generators are left alone."""
        for name, tensor in _tensors(module):
            tensor.grad = None
            saved = self._tensors.get(name)
            if saved is not None:
                # By its data: a precision that converts the module has left another dtype.
                tensor.data = saved.to(tensor.device, copy=True)
                if tensor.is_leaf:
                    tensor.requires_grad_(self._learns[name])
        for name, each in module.named_modules():
            each.training = self._modes.get(name, each.training)
            if isinstance(each, torchmetrics.Metric):
                each.reset()

    def restore_generators(self) -> None:
        """Put the generators back, for a fit that begins from nothing again."""
        restore_rng(self._rng)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
