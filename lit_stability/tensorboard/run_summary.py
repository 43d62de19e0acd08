"""Describes a run for the list of runs: its steps, layers, optimizers and status.

Imports neither torch nor TensorBoard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from lit_stability.incidents.step_history import FIELDS
from lit_stability.tensorboard.run_tags import RunTags, read_status, whole_rows
from lit_stability.tensorboard.tags import INCIDENTS, layers_prefix, steps_tag


def summary_of(
    run: str, tags: RunTags, rows: list[Any] | str, states: list[Any] | str
) -> dict[str, Any]:
    """Returns the entry of `StabilityData.runs` for a run.

    Args:
        run: its name.
        tags: its tags.
        rows: samples of its first optimizer; or why they cannot be read.
        states: the same for its status.
    """
    tag, unreadable = steps_tag(0), rows if isinstance(rows, str) else None
    data = [] if isinstance(rows, str) or tag not in tags.about else rows
    whole = whole_rows(data, width_of(tags, tag), steps=True)
    broken = f"{tag}: {len(data) - len(whole)} of {len(data)} rows are damaged and ignored"
    steps = in_force(whole)
    return {
        "run": run,
        "steps": len(steps),
        "layers": len(names_of(series_of(tags.about, layers_prefix(0, "grad_norm")))),
        "incidents": sum(tag.startswith(INCIDENTS) for tag in tags.about),
        "last": int(steps[-1].numpy[1]) if steps else None,
        "updated": steps[-1].wall_time if steps else None,
        "status": None if isinstance(states, str) or not states else read_status(states[-1].numpy),
        "optimizers": _optimizers(tags.about),
        "problem": tags.problem or unreadable or (broken if len(whole) < len(data) else None),
    }


def width_of(tags: RunTags, tag: str) -> int:
    """Returns the number of values in a row of steps."""
    return len(tags.about.get(tag, {}).get("fields", FIELDS))


def series_of(tags: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, Mapping[str, Any]]:
    """Returns the tags that begin with a prefix."""
    return {tag: about for tag, about in tags.items() if tag.startswith(prefix)}


def _optimizers(tags: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the index of each optimizer, and the module that contains all its layers."""
    return [
        {"index": i, "part": common_part(names_of(series_of(tags, layers_prefix(i, "grad_norm"))))}
        for i in range(len(tags))
        if steps_tag(i) in tags
    ]


def common_part(names: Sequence[str]) -> str:
    """Returns the innermost module that contains all parameters; "" for the whole model.

    >>> common_part(["gan.critic.0.weight", "gan.critic.1.bias"]), common_part(["a.b", "ab.c"])
    ('gan.critic', '')
    """
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda parts: len({*parts}) == 1, levels))


def names_of(series: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the layers of all series; the longest series comes first, in model order."""
    by_length = sorted((about["names"] for about in series.values()), key=len, reverse=True)
    return list(dict.fromkeys(name for names in by_length for name in names))


def in_force(data: Iterable[Any]) -> list[Any]:
    """Returns samples in order of their attempts; of repeated attempts, only the later ones.

    A job that resumes a checkpoint continues the count from there. What the previous job did after
    that checkpoint is no longer part of the run.
    """
    kept: list[Any] = []
    for datum in data:
        while kept and kept[-1].step >= datum.step:
            kept.pop()
        kept.append(datum)
    return kept
