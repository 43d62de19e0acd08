"""All kinds by name, and the selection of a quick run."""

from __future__ import annotations

from benchmarks.healthy import codebooks, copies, structure, writes
from benchmarks.healthy.kind import Kind

PARTS = (writes, codebooks, copies, structure)

KINDS: dict[str, Kind] = {kind.name: kind for part in PARTS for kind in part.KINDS}
"""Kinds by name, in the order of their groups."""

QUICK: tuple[str, ...] = (
    "last layer reset every 100 steps, module hook",
    "weights clamped each step, optimizer_step, .data",
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
