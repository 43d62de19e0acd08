"""All kinds by name, and the selection of a quick run."""

from __future__ import annotations

from benchmarks.healthy import (
    adversaries,
    bursts,
    codebooks,
    copies,
    floors,
    loops,
    schedules,
    structure,
    writes,
)
from benchmarks.healthy.kind import Kind

PARTS = (writes, codebooks, copies, structure, adversaries, bursts, floors, schedules, loops)

KINDS: dict[str, Kind] = {kind.name: kind for part in PARTS for kind in part.KINDS}
"""Kinds by name, in the order of their groups."""

QUICK: tuple[str, ...] = (
    "last layer reset every 100 steps, module hook",
    "weights clamped each step, optimizer_step, .data",
    "VQ codes as running means in a buffer",
    "target network moved each step, in no optimizer",
    "auxiliary loss x100 every 50 steps",
    "REINFORCE, lognormal returns",
    "hinge loss on separable data",
    "solved from the start",
    "warm restarts",
    "manual optimization",
    "clipped by value",
    "mixup in place",
)
"""At least one kind of every group."""


def select(texts: list[str]) -> list[Kind]:
    """Returns the kinds whose names contain one of the texts.

    Raises:
        ValueError: A text is in no name.
    """
    for text in texts:
        if not any(text in name for name in KINDS):
            raise ValueError(f"no kind has {text!r} in its name; choose from {list(KINDS)}")
    return [kind for name, kind in KINDS.items() if any(text in name for text in texts)]
