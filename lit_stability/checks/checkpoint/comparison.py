"""The difference between two checkpoints, and its printed form.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_stability.checks.text_table import align, format_number, join_names, more_rows


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one tensor; computed from the elements that are finite in both checkpoints."""

    name: str
    elements: int
    difference: float
    """Norm of the difference."""
    relative: float
    """Norm of the difference, divided by the norm before; Inf if the tensor was all zero before."""
    cosine: float | None
    """Cosine of the angle between the tensors, in [-1, 1]; None if one of them is all zero."""
    largest: float
    """Largest absolute difference of an element."""
    norm_before: float
    norm_after: float
    non_finite_before: int = 0
    non_finite_after: int = 0

    @property
    def frozen(self) -> bool:
        """Whether no element has changed."""
        return self.largest == 0 and self.non_finite_before == self.non_finite_after


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences between two checkpoints, tensor by tensor."""

    changes: tuple[Change, ...]
    """Of the tensors that can be compared; non-finite ones first, then the largest changes."""
    relative: float
    """Norm of all differences, divided by the norm of all tensors before; Inf if that is 0."""
    only_before: tuple[str, ...] = ()
    """Names of tensors that only the first checkpoint has."""
    only_after: tuple[str, ...] = ()
    """Names of tensors that only the second checkpoint has."""
    reshaped: tuple[tuple[str, str, str], ...] = ()
    """Name, shape before, shape after; these tensors were not compared."""
    retyped: tuple[tuple[str, str, str], ...] = ()
    """Name, dtype before, dtype after; these tensors were compared."""
    steps: tuple[int | None, int | None] = (None, None)
    """``global_step`` of the first and of the second checkpoint."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of unchanged tensors; ``module.*`` if all tensors of a module are unchanged."""
        unchanged = [change.name for change in self.changes if change.frozen]
        changed = [change.name for change in self.changes if not change.frozen]
        return grouped(unchanged, changed)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self) | {"schema": 1, "frozen": self.frozen}


def grouped(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Returns names, with ``prefix.*`` in place of all names of a module.

    Args:
        names: Names to group.
        others: All other names of the model.

    >>> grouped(["encoder.0.weight", "encoder.0.bias", "head.bias"], ["head.weight"])
    ('encoder.*', 'head.bias')
    """
    taken = {".".join(parts[:i]) for o in others for parts in [o.split(".")] for i in range(9)}
    groups = []
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(len(parts)))
        prefix = next((p for p in prefixes if p not in taken), None)
        groups.append(name if prefix is None else f"{prefix}.*".removeprefix("."))
    return tuple(dict.fromkeys(groups))


def format_comparison(comparison: Comparison, limit: int | None = 20) -> str:
    """Returns a comparison as text: a summary and a table, largest changes first.

    Args:
        comparison: Of two checkpoints.
        limit: Largest number of rows of the table and of names in a list; None for all.

    Raises:
        ValueError: If `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for every row")
    changed = [change for change in comparison.changes if not change.frozen]
    lines = [_heading(comparison), *_lists(comparison, limit)]
    if changed:
        head = ("tensor", "change", "cosine", "largest", "norm before", "norm after", "NaN/Inf")
        lines += ["", *align([head, *(_cells(change) for change in changed[:limit])], left=1)]
        lines += more_rows(len(changed) - len(changed[:limit]), "tensors")
    return "\n".join(lines)


def _heading(comparison: Comparison) -> str:
    before, after = comparison.steps
    steps = "" if before is None or after is None else f", step {before} to step {after}"
    frozen = sum(change.frozen for change in comparison.changes)
    unchanged = f"; {frozen} of them are unchanged" if frozen else ""
    return (
        f"{len(comparison.changes)} tensors compared{steps}: together they changed by "
        f"{comparison.relative:.3g} of their norm{unchanged}"
    )


def _lists(comparison: Comparison, limit: int | None) -> list[str]:
    reshaped = tuple(f"{n} {before} -> {after}" for n, before, after in comparison.reshaped)
    retyped = tuple(f"{n} {before} -> {after}" for n, before, after in comparison.retyped)
    lists = (
        ("bitwise unchanged", comparison.frozen),
        ("only before", comparison.only_before),
        ("only after", comparison.only_after),
        ("different shape, not compared", reshaped),
        ("different dtype", retyped),
    )
    return [f"{what}: {join_names(names, limit)}" for what, names in lists if names]


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
