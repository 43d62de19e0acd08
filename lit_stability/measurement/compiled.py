"""Finds compiled parts of a model, whose inner modules run no hooks. May import torch."""

from __future__ import annotations

from torch import nn


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether any module was compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
