"""What Lightning's progress bar calls an epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lit_stability.lightning_package import Trainer


def leave_out_unlimited_epochs(trainer: Trainer) -> None:
    """Has a rich progress bar show "Epoch 3" instead of "Epoch 3/-2" where epochs have no bound.

    Args:
        trainer: before its fit.
    """
    bar = trainer.progress_bar_callback
    describe = getattr(bar, "_get_train_description", None)
    if bar is not None and describe is not None:
        named = functools.partial(_without_bound, describe)
        bar._get_train_description = named  # type: ignore[attr-defined]


def _without_bound(describe: Callable[[int], str], current_epoch: int) -> str:
    return describe(current_epoch).replace("/-2", "", 1)
