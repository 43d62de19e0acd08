"""What a step may change, set aside before it is run again and put back afterwards.

May import torch; knows no Lightning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local
from lit_stability.training_state.rng import capture_rng, restore_rng


class StepState:
    """Gradients, buffers, generators and flags of a model, and all else that a step writes to.

    Gradients are set aside and not copied: while the step runs again, parameters have none, and
    hooks that act on accumulated gradients (an optimizer fused into the backward pass) do not run.

    Args:
        model: the module whose state is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rng = capture_rng()
        plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._modules = [(m, m.training, dict(m._buffers)) for m in plain]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._grads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
        self._memory: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        for buffer in model.buffers():
            self.keep(buffer)
        for parameter in model.parameters():
            self.set_aside(parameter)

    def set_aside(self, leaf: Tensor) -> None:
        """Take the gradient off a leaf of the graph, and its hooks, once."""
        if id(leaf) in self._grads:
            return
        self._grads[id(leaf)] = (leaf, leaf.grad)
        leaf.grad = None
        hooks = leaf._post_accumulate_grad_hooks
        if hooks:
            self._hooks.append((hooks, dict(hooks)))
            hooks.clear()

    def keep(self, tensor: Tensor) -> None:
        """Copy the memory of a tensor that is about to be written to, once."""
        tensor = local(tensor)
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = (storage, storage.clone())  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Put everything back."""
        for storage, copy in self._memory.values():
            # Memory that its owner gives back, as FSDP that of gathered weights, held no state.
            if storage.nbytes() == copy.nbytes():
                storage.copy_(copy)
        for module, training, buffers in self._modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(buffers)
        for leaf, grad in self._grads.values():
            leaf.grad = grad
        for hooks, taken in self._hooks:
            hooks.update(taken)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        restore_rng(self._rng)
