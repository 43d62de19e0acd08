"""What lies between two checkpoints, and how it is told.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_stability.checks.text_table import align, format_number, join_names, more_rows


@dataclass(frozen=True, kw_only=True)
class Change:
    """One tensor, before and after. Of its elements that are finite on both sides."""

    name: str
    elements: int
    difference: float
    """Norm of the difference."""
    relative: float
    """The same over the norm of the tensor before; Inf where that was all zero."""
    cosine: float | None
    """Cosine of the angle between the two, in [-1, 1]; None where one of them is all zero."""
    largest: float
    """Largest magnitude of an element's difference."""
    norm_before: float
    norm_after: float
    non_finite_before: int = 0
    non_finite_after: int = 0

    @property
    def frozen(self) -> bool:
        """Whether not one element has changed."""
        return self.largest == 0 and self.non_finite_before == self.non_finite_after


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints, tensor by tensor: ``changes``, the largest first, and what only one has."""

    changes: tuple[Change, ...]
    """Of the tensors that can be compared; non-finite ones first, then what changed most."""
    relative: float
    """Norm of all differences over that of all tensors before; Inf where those were all zero."""
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, str, str], ...] = ()
    """Name, shape before, shape after: these were not compared."""
    retyped: tuple[tuple[str, str, str], ...] = ()
    """Name, dtype before, dtype after: these were compared all the same."""
    steps: tuple[int | None, int | None] = (None, None)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names that have not changed at all, joined to ``module.*`` where a module is whole."""
        same = [each.name for each in self.changes if each.frozen]
        moved = [each.name for each in self.changes if not each.frozen]
        return grouped(same, moved)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"schema": 1, "frozen": self.frozen}


def grouped(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Names, where all that begins alike is among them under that beginning.

    Args:
        names: to be grouped.
        others: names that are not among them.

    >>> grouped(["encoder.0.weight", "encoder.0.bias", "head.bias"], ["head.weight"])
    ('encoder.*', 'head.bias')
    """
    taken = {".".join(parts[:i]) for o in others for parts in [o.split(".")] for i in range(9)}
    found = []
    for name in names:
        parts = name.split(".")
        starts = (".".join(parts[:i]) for i in range(len(parts)))
        start = next((each for each in starts if each not in taken), None)
        found.append(name if start is None else f"{start}.*".removeprefix("."))
    return tuple(dict.fromkeys(found))


def format_comparison(comparison: Comparison, limit: int | None = 20) -> str:
    """Put a comparison in words and a table, what changed most first.

    Args:
        comparison: of two checkpoints.
        limit: most rows of the table and names of a list; None for all.

    Raises:
        ValueError: if `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for every row")
    moved = [each for each in comparison.changes if not each.frozen]
    lines = [_heading(comparison), *_lists(comparison, limit)]
    if moved:
        head = ("tensor", "change", "cosine", "largest", "norm before", "norm after", "NaN/Inf")
        lines += ["", *align([head, *(_cells(each) for each in moved[:limit])], left=1)]
        lines += more_rows(len(moved) - len(moved[:limit]), "tensors")
    return "\n".join(lines)


def _heading(comparison: Comparison) -> str:
    before, after = comparison.steps
    steps = "" if before is None or after is None else f", step {before} to step {after}"
    frozen = sum(each.frozen for each in comparison.changes)
    unchanged = f", {frozen} of them not at all" if frozen else ""
    return (
        f"{len(comparison.changes)} tensors compared{steps}: together they changed by "
        f"{comparison.relative:.3g} of their norm{unchanged}"
    )


def _lists(comparison: Comparison, limit: int | None) -> list[str]:
    reshaped = tuple(f"{n} {before} -> {after}" for n, before, after in comparison.reshaped)
    retyped = tuple(f"{n} {before} -> {after}" for n, before, after in comparison.retyped)
    told = (
        ("unchanged to the last bit", comparison.frozen),
        ("only before", comparison.only_before),
        ("only after", comparison.only_after),
        ("of another shape, not compared", reshaped),
        ("of another dtype", retyped),
    )
    return [f"{what}: {join_names(names, limit)}" for what, names in told if names]


def _cells(change: Change) -> tuple[str, ...]:
    bad = change.non_finite_before, change.non_finite_after
    return (
        change.name,
        format_number(change.relative),
        "-" if change.cosine is None else f"{change.cosine:.4f}",
        format_number(change.largest),
        format_number(change.norm_before),
        format_number(change.norm_after),
        f"{bad[0]} -> {bad[1]}" if any(bad) else ".",
    )
