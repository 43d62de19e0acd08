"""Names of learning-rate schedulers, for messages."""

from __future__ import annotations

from typing import Any

_OPTIONS = ("gamma", "factor", "step_size", "T_max", "total_iters")
"""Options that decide how fast the learning rate falls."""


def describe_scheduler(scheduler: Any) -> str:
    """Returns the class of a scheduler, with the options that decide how fast the rate falls.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    >>> describe_scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 30, gamma=0.5))
    'StepLR (gamma=0.5, step_size=30)'
    """
    options = [f"{key}={getattr(scheduler, key)}" for key in _OPTIONS if hasattr(scheduler, key)]
    inner = [describe_scheduler(each) for each in getattr(scheduler, "_schedulers", ())]
    details = ", ".join(inner or options)
    return type(scheduler).__name__ + (f" ({details})" if details else "")
