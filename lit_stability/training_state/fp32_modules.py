"""fp32 islands: modules that compute in float32 while the model around them is in 16 bits.

A module's ``forward`` is replaced by one that runs without autocast, its inputs cast to float32.
No hook is set, no parameter renamed, and modules stay picklable. May import torch.
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
    """Names of the outermost modules that any pattern matches, in the order of the model.

    Args:
        model: whose submodules to look at.
        patterns: a name or glob of names (``"encoder.*norm*"``), the name of a class
            (``"LayerNorm"``) or a class (``nn.Softmax``, subclasses included).

    Raises:
        ValueError: if a pattern matches no module that computes anything, repeating it.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = [n for n, m in model.named_modules() if n and _fits(n, m, pattern)]
        if not names:
            raise ValueError(
                f"fp32_modules: {_in_words(pattern)} matches no module of "
                f"{type(model).__name__}; give a name or glob of named_modules(), the name of a "
                "class, or a class"
            )
        found.update(name for each in names for name in _computing(model, each))
    return [n for n, _ in model.named_modules() if n in found and not _inside(n, found)]


def keep_in_fp32(module: nn.Module) -> None:
    """Let a module compute in float32 from now on; one that does is left as it is.

    Its weights stay in their format unless that is a half: those are converted, in place.
    """
    if is_kept_in_fp32(module):
        return
    weights = [*module.parameters(), *module.buffers()]
    half = next((t.dtype for t in weights if t.dtype in HALF), None)
    widen(weights)
    vars(module)["_before_island"] = vars(module).get("forward")
    module.forward = functools.partial(_forward, module, half)


def release_from_fp32(module: nn.Module) -> None:
    """Let it compute as before; weights that were converted stay float32."""
    if not is_kept_in_fp32(module):
        return
    before = vars(module).pop("_before_island")
    del module.forward
    if before is not None:
        module.forward = before


def is_kept_in_fp32(module: nn.Module) -> bool:
    """Whether the module computes in float32 on its own."""
    return "_before_island" in vars(module)


def fp32_modules_of(model: nn.Module) -> list[str]:
    """Names of the modules that do."""
    return [name for name, module in model.named_modules() if is_kept_in_fp32(module)]


def _forward(module: nn.Module, out: torch.dtype | None, *args: Any, **kwargs: Any) -> Any:
    before = module.__dict__["_before_island"]
    forward = type(module).forward.__get__(module) if before is None else before
    device = _device_of(module, args, kwargs)
    args, kwargs = cast(args, torch.float32), cast(kwargs, torch.float32)
    with torch.autocast(device, enabled=False):
        result = forward(*args, **kwargs)
    return result if out is None else cast(result, out, (torch.float32,))


def _device_of(module: nn.Module, args: Any, kwargs: Any) -> str:
    for each in (*args, *kwargs.values(), *module.parameters(recurse=False)):
        if isinstance(each, Tensor):
            return each.device.type
    return "cpu"


def _fits(name: str, module: nn.Module, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern) or type(module).__name__ == pattern
    return isinstance(module, pattern)


def _computing(model: nn.Module, name: str) -> list[str]:
    """The module itself, or what it holds if it is a mere container."""
    module = model.get_submodule(name)
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [name]
    return [each for n, _ in module.named_children() for each in _computing(model, f"{name}.{n}")]


def _inside(name: str, others: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))


def _in_words(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__
