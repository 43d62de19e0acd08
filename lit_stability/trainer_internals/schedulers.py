"""Learning-rate schedulers: their state, and their names for messages."""

from __future__ import annotations

import copy
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


class SchedulerState:
    """Copy of a scheduler's state.

    A ``state_dict`` lacks functions, of which ``LambdaLR`` keeps one for each parameter group; a
    group that was added since has brought one more.

    Args:
        scheduler: to copy.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._state = copy.deepcopy(scheduler.state_dict())
        self._lists = [
            (owner, name, list(value))
            for owner in (scheduler, *getattr(scheduler, "_schedulers", ()))
            for name, value in vars(owner).items()
            if isinstance(value, list) and any(callable(each) for each in value)
        ]

    def restore(self) -> None:
        """Restores the state."""
        for owner, name, functions in self._lists:
            setattr(owner, name, list(functions))
        self._scheduler.load_state_dict(copy.deepcopy(self._state))
