"""Groups parameters into as many rows as a picture holds, in the order of the model.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from lit_stability.measurement.step_stats import GradientDetail


@dataclass(frozen=True)
class LayerRow:
    """One row of a picture: one parameter, or several neighbours joined."""

    name: str
    members: tuple[GradientDetail, ...]

    @property
    def norm(self) -> float:
        """Norm of all members together; NaN if one is NaN, else Inf if one is Inf."""
        return joined_norm([norm_of(each) for each in self.members])

    @property
    def finite(self) -> tuple[GradientDetail, ...]:
        """Members whose gradient is finite."""
        return tuple(each for each in self.members if math.isfinite(each.norm))

    @property
    def all_zero(self) -> bool:
        """Whether every element of every member is 0."""
        return self.norm == 0

    @property
    def minimum(self) -> float:
        """Smallest element of the finite members."""
        return min((each.minimum for each in self.finite), default=0.0)

    @property
    def maximum(self) -> float:
        """Largest element of the finite members."""
        return max((each.maximum for each in self.finite), default=0.0)

    @property
    def zero_share(self) -> float:
        """Largest share of zeros of any finite member, in [0, 1]."""
        return max((each.zero_share for each in self.finite), default=0.0)

    def norm_among(self, norms: Mapping[str, float]) -> float | None:
        """Norm of the same members in `norms`; None if one of them is missing."""
        own = [norms.get(each.name) for each in self.members]
        return None if None in own else joined_norm([norm for norm in own if norm is not None])


def norm_of(detail: GradientDetail) -> float:
    """Returns the norm, or the largest magnitude if all squares are below float32's range."""
    return detail.norm or max(abs(detail.minimum), abs(detail.maximum))


def joined_norm(norms: Sequence[float]) -> float:
    """Returns the norm of the whole from the norms of its parts; NaN if one of them is NaN.

    >>> joined_norm([3.0, 4.0]), joined_norm([math.inf, math.nan])
    (5.0, nan)
    """
    return math.nan if any(math.isnan(norm) for norm in norms) else math.hypot(*norms)


def layer_rows(details: Sequence[GradientDetail], most: int = 40) -> list[LayerRow]:
    """Joins neighbouring parameters into at most `most` rows, in the order of the model.

    If there are too many parameters, names are cut at the deepest level that leaves at most `most`
    rows. If that leaves less than a quarter of `most`, as in a model that is one long list, the
    rows one level deeper are joined in runs of equal length instead.

    Args:
        details: gradient details, in the order of the model.
        most: largest number of rows.

    Returns:
        The rows; a joined row has the common part of the names, or the first and the last name.

    Raises:
        ValueError: if `most` is less than 1.

    >>> def one(name):
    ...     return GradientDetail(
    ...         name=name, norm=1.0, mean=0.0, std=1.0, minimum=-1.0, maximum=1.0, zero_share=0.0
    ...     )
    >>> details = [one(f"net.{i}.{n}") for i in range(6) for n in ("weight", "bias")]
    >>> [row.name for row in layer_rows(details, 8)]
    ['net.0', 'net.1', 'net.2', 'net.3', 'net.4', 'net.5']
    >>> [row.name for row in layer_rows(details, 5)]
    ['net.0 ... net.1', 'net.2 ... net.3', 'net.4 ... net.5']
    """
    if most < 1:
        raise ValueError(f"most={most} must be at least 1")
    deepest = max((each.name.count(".") + 1 for each in details), default=1)
    finer: list[LayerRow] = []
    for level in range(deepest, 0, -1):
        rows = _cut(details, level)
        if len(rows) <= most:
            # At least a quarter, rounded up: one row for hundreds of layers would show nothing.
            return rows if 4 * len(rows) >= most or not finer else _runs(finer, most)
        finer = rows
    return _runs(finer, most)


def _cut(details: Sequence[GradientDetail], level: int) -> list[LayerRow]:
    """Joins neighbours whose names agree in their first `level` parts."""
    cut = groupby(details, key=lambda each: ".".join(each.name.split(".")[:level]))
    return [LayerRow(name, tuple(members)) for name, members in cut]


def _runs(rows: Sequence[LayerRow], most: int) -> list[LayerRow]:
    length = -(-len(rows) // most)
    runs = [rows[i : i + length] for i in range(0, len(rows), length)]
    return [
        LayerRow(
            run[0].name if len(run) == 1 else f"{run[0].name} ... {run[-1].name}",
            tuple(each for row in run for each in row.members),
        )
        for run in runs
    ]
