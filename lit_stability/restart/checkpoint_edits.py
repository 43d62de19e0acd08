"""A checkpoint for smaller micro-batches: where it stands in its epoch, counted in them.

Works on the dict that Lightning has loaded, never on the file. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

_PROGRESS = "epoch_loop.batch_progress"


def count_in_parts(checkpoint: MutableMapping[str, Any], parts: int) -> None:
    """Rewrite the counters of batches for batches cut into equal parts.

    After batch k of the epoch comes batch k x parts. Optimizer and scheduler steps are not
    touched: with as much more accumulation there are as many of them as before.

    Args:
        checkpoint: as Lightning makes it; changed in place.
        parts: into how many each batch is cut.

    >>> counts = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    >>> loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": counts, "current": counts}}}
    >>> count_in_parts({"loops": loops}, 2)
    >>> loops["fit_loop"]["epoch_loop.batch_progress"]["current"]
    {'ready': 6, 'started': 6, 'processed': 6, 'completed': 5}
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    progress = fit_loop[_PROGRESS]
    fit_loop[_PROGRESS] = {**progress} | {
        # What has begun and is not completed is the last part of the last batch.
        span: {name: count + (parts - 1) * counts["ready"] for name, count in counts.items()}
        for span, counts in progress.items()
        if span in ("total", "current")
    }


def forget_moments(checkpoint: MutableMapping[str, Any]) -> None:
    """Empty the state of every optimizer, which begins anew; its options stay.

    >>> checkpoint = {"optimizer_states": [{"state": {0: "moments"}, "param_groups": [0]}]}
    >>> forget_moments(checkpoint)
    >>> checkpoint
    {'optimizer_states': [{'state': {}, 'param_groups': [0]}]}
    """
    checkpoint["optimizer_states"] = [
        {**state, "state": {}} for state in checkpoint.get("optimizer_states", [])
    ]
