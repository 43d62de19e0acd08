"""Edits of a loaded checkpoint: progress counters for smaller micro-batches, empty optimizer state.

Changes the dict that Lightning has loaded, never the file. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

_PROGRESS = "epoch_loop.batch_progress"


def rescale_batch_progress(checkpoint: MutableMapping[str, Any], parts: int) -> None:
    """Converts the batch counters for batches that are split into equal parts.

    Batch k of the epoch becomes batch k x parts. The counts of optimizer and scheduler steps are
    unchanged, because accumulation grows by the same factor.

    Args:
        checkpoint: a checkpoint in Lightning's format; changed in place.
        parts: number of parts that each batch is split into.

    >>> counts = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    >>> loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": counts, "current": counts}}}
    >>> rescale_batch_progress({"loops": loops}, 2)
    >>> loops["fit_loop"]["epoch_loop.batch_progress"]["current"]
    {'ready': 6, 'started': 6, 'processed': 6, 'completed': 5}
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    progress = fit_loop[_PROGRESS]
    fit_loop[_PROGRESS] = {**progress} | {
        # The batch that was started but not completed is the last part of the last batch.
        span: {name: count + (parts - 1) * counts["ready"] for name, count in counts.items()}
        for span, counts in progress.items()
        if span in ("total", "current")
    }


def clear_optimizer_state(checkpoint: MutableMapping[str, Any]) -> None:
    """Clears the state of every optimizer, so that it starts from scratch; its options stay.

    >>> checkpoint = {"optimizer_states": [{"state": {0: "moments"}, "param_groups": [0]}]}
    >>> clear_optimizer_state(checkpoint)
    >>> checkpoint
    {'optimizer_states': [{'state': {}, 'param_groups': [0]}]}
    """
    checkpoint["optimizer_states"] = [
        {**state, "state": {}} for state in checkpoint.get("optimizer_states", [])
    ]
