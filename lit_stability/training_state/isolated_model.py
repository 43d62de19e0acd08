"""What a step may change in a model: recorded before a step is run in isolation, then restored.

May import torch; knows no Lightning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_stability.distributed.dtensor import local
from lit_stability.training_state.rng import capture_rng, restore_rng


class IsolatedModel:
    """Gradients, buffers, generators and flags of a model, to be restored after an isolated step.

    Gradients are removed and not copied: while the step runs, parameters have none, and hooks that
    act on accumulated gradients (an optimizer fused into the backward pass) do not run. Weights
    are not recorded: a step that writes to its weights is not undone.

    Args:
        model: the module whose state is recorded.

    >>> model = nn.BatchNorm1d(2)
    >>> state = IsolatedModel(model)
    >>> _ = model(torch.randn(4, 2))
    >>> int(model.num_batches_tracked)
    1
    >>> state.restore()
    >>> int(model.num_batches_tracked), model.running_mean.tolist()
    (0, [0.0, 0.0])
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
            self.copy_memory(buffer)
        for parameter in model.parameters():
            self.remove_gradient(parameter)

    def remove_gradient(self, leaf: Tensor) -> None:
        """Removes the gradient of a leaf of the graph, and its hooks, until `restore`."""
        if id(leaf) in self._grads:
            return
        self._grads[id(leaf)] = (leaf, leaf.grad)
        leaf.grad = None
        hooks = leaf._post_accumulate_grad_hooks
        if hooks:
            self._hooks.append((hooks, dict(hooks)))
            hooks.clear()

    def copy_memory(self, tensor: Tensor) -> None:
        """Copies the memory of a tensor that is about to be written to, once."""
        tensor = local(tensor)
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = (storage, storage.clone())  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Restores everything that was recorded."""
        for storage, copy in self._memory.values():
            # Memory that its owner frees, as FSDP frees that of gathered weights, held no state.
            if storage.nbytes() == copy.nbytes():
                storage.copy_(copy)
        for module, training, buffers in self._modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(buffers)
        for leaf, grad in self._grads.values():
            leaf.grad = grad
        for hooks, removed in self._hooks:
            hooks.update(removed)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        restore_rng(self._rng)
