"""Which module of a model is running, in a forward pass. May import torch."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


class RunningModules:
    """Follows which module runs; no hook is installed before `follow` and after `stop`.

    Args:
        model: gives the module names; it must not be compiled.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> running, seen = RunningModules(model), []
    >>> running.follow()
    >>> handle = model[0].register_forward_pre_hook(lambda *_: seen.append(running.innermost))
    >>> _ = model(torch.zeros(1, 2)); running.stop(); handle.remove(); seen
    ['0']
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(m): path for path, m in model.named_modules()}
        self._stack = [""]
        self._thread = get_ident()
        self._handles: list[Any] = []

    @property
    def innermost(self) -> str:
        """Name of the innermost module of the model that runs; "" for the model itself."""
        return self._stack[-1]

    @property
    def followed(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._handles)

    def follow(self) -> None:
        """Installs the hooks."""
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._counts():
            self._stack.append(self._paths.get(id(module), self._stack[-1]))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._counts() and len(self._stack) > 1:
            self._stack.pop()

    def _counts(self) -> bool:
        """Whether to handle a hook call; hooks also run in other threads and while compiling."""
        return not torch.compiler.is_compiling() and get_ident() == self._thread
