"""Learning-rate schedules as functions of the optimizer step, and their schedulers.

Each function returns a factor on the peak learning rate; steps count from 0.
"""

import math
from functools import partial
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

Schedule = Literal["none", "warmup_cosine", "onecycle", "inverse_sqrt"]


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Rises linearly to 1 during warm-up, then falls as half a cosine to 0 at `total_steps`.

    >>> [round(warmup_cosine(s, warmup_steps=2, total_steps=6), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def inverse_sqrt(step: int, *, warmup_steps: int) -> float:
    """Rises linearly to 1 during warm-up, then falls as 1/sqrt(step) (Vaswani et al. 2017, eq. 3).

    >>> [round(inverse_sqrt(s, warmup_steps=4), 3) for s in (0, 1, 3, 15, 63)]
    [0.25, 0.5, 1.0, 0.5, 0.25]
    """
    warmup = max(1, warmup_steps)
    return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


def make_scheduler(
    schedule: Schedule, optimizer: Optimizer, *, warmup_steps: int, total_steps: float
) -> LRScheduler | None:
    """Creates a scheduler to step once per optimizer step; None for a constant learning rate.

    The peak is the optimizer's learning rate. `onecycle` starts at 1/25 of the peak, reaches it
    at the end of the warm-up and ends near zero (Smith and Topin 2018). A run shorter than its
    warm-up ends before the peak.

    Raises:
        ValueError: The schedule needs the total number of steps and it is unknown.
    """
    if schedule == "none":
        return None
    if schedule == "inverse_sqrt":
        return LambdaLR(optimizer, partial(inverse_sqrt, warmup_steps=warmup_steps))
    if not math.isfinite(total_steps) or total_steps < 1:
        raise ValueError(
            f"schedule={schedule!r} needs the number of steps, which is {total_steps}; set "
            f"Trainer(max_steps=...) or max_epochs, or choose 'inverse_sqrt'"
        )
    total = int(total_steps)
    if schedule == "warmup_cosine":
        factor = partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total)
        return LambdaLR(optimizer, factor)
    peaks = [group["lr"] for group in optimizer.param_groups]
    # OneCycleLR peaks at step pct_start * total - 1, which must be after step 0 and before the end.
    warmup = max(2, warmup_steps)
    total = max(warmup + 1, total)
    pct_start = min(1.0, warmup / total)
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=total, pct_start=pct_start)
