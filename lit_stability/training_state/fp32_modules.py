"""Modules kept in fp32: they compute in float32 while the rest of the model is in 16 bits.

A module's ``forward`` is replaced by one that casts the inputs to float32 and runs without
autocast. No hook is set, no parameter is renamed, and modules stay picklable. May import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_stability.measurement.half_precision import HALF, cast, widen

Pattern: TypeAlias = str | type[nn.Module]


def matching(model: nn.Module, patterns: Iterable[Pattern]) -> list[str]:
    """Returns the names of the outermost modules that match any pattern, in model order.

    Args:
        model: the model whose submodules are matched.
        patterns: each a module name or glob (``"encoder.*norm*"``), a class name
            (``"LayerNorm"``) or a class (``nn.Softmax``, which includes its subclasses).

    Raises:
        ValueError: if a pattern matches no module that computes anything.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = [n for n, m in model.named_modules() if n and _fits(n, m, pattern)]
        if not names:
            raise ValueError(
                f"fp32_modules: {_describe(pattern)} matches no module of "
                f"{type(model).__name__}; give a name or glob of named_modules(), a class name, "
                "or a class"
            )
        found.update(name for match in names for name in _computing(model, match))
    return [n for n, _ in model.named_modules() if n in found and not _inside(n, found)]


def keep_in_fp32(module: nn.Module) -> None:
    """Makes a module compute in float32; has no effect on a module that already does.

    Float16 and bfloat16 weights are converted to float32 in place; others keep their dtype.
    """
    if is_kept_in_fp32(module):
        return
    weights = [*module.parameters(), *module.buffers()]
    half = next((t.dtype for t in weights if t.dtype in HALF), None)
    widen(weights)
    vars(module)["_original_forward"] = vars(module).get("forward")
    module.forward = functools.partial(_forward, module, half)


def release_from_fp32(module: nn.Module) -> None:
    """Restores the module's own ``forward``; converted weights stay in float32."""
    if not is_kept_in_fp32(module):
        return
    before = vars(module).pop("_original_forward")
    del module.forward
    if before is not None:
        module.forward = before


def is_kept_in_fp32(module: nn.Module) -> bool:
    """Returns whether `keep_in_fp32` is in effect for the module."""
    return "_original_forward" in vars(module)


def fp32_modules_of(model: nn.Module) -> list[str]:
    """Returns the names of the modules that are kept in fp32."""
    return [name for name, module in model.named_modules() if is_kept_in_fp32(module)]


def _forward(module: nn.Module, out: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    before = module.__dict__["_original_forward"]
    # Not `forward.__get__(module)`, which the compiler of torch 2.8 cannot trace.
    forward = functools.partial(type(module).forward, module) if before is None else before
    device = _device_of(module, args, kwargs)
    args, kwargs = cast(args, torch.float32), cast(kwargs, torch.float32)
    with torch.autocast(device, enabled=False):
        result = forward(*args, **kwargs)
    return result if out is None else cast(result, out, (torch.float32,))


def _device_of(module: nn.Module, args: Any, kwargs: Any) -> str:
    for value in (*args, *kwargs.values(), *module.parameters(recurse=False)):
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"


def _fits(name: str, module: nn.Module, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern) or type(module).__name__ == pattern
    return isinstance(module, pattern)


def _computing(model: nn.Module, name: str) -> list[str]:
    """Returns the name itself, or for a container the names of the modules in it."""
    module = model.get_submodule(name)
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [name]
    return [each for n, _ in module.named_children() for each in _computing(model, f"{name}.{n}")]


def _inside(name: str, others: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))


def _describe(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__
