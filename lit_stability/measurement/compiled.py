"""Whether parts of a model are compiled, so that what goes on inside is not seen.

May import torch.
"""

from __future__ import annotations

from torch import nn


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether a module in it was compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
