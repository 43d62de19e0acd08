"""Compares magnitudes with the limits of a format: overflows, vanishing gradients, loss scales.

A loss scale is a power of two that multiplies the loss, and therefore all gradients (Micikevicius
et al. 2018, section 3.2). Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_stability.checks.precision_ranges.bins import finite_edge
from lit_stability.checks.precision_ranges.report import LOSS, RangeReport, RangeRow, pooled
from lit_stability.measurement.float_formats import FloatFormat

TOLERATED = 1e-3
"""Tolerated share of nonzero gradient elements that become zero, over the whole model."""
STARVED = 0.1
"""Share of nonzero gradient elements that become zero above which a layer is reported."""


@dataclass(frozen=True)
class LossScale:
    """The usable loss scales, as a range of exponents of two, both ends included.

    The loss itself is assumed to be computed in float32, as 16-mixed does with torch's losses.
    """

    lowest: int
    """Below this exponent too many elements become zero."""
    highest: int
    """Above this exponent the largest element overflows. The gradient of a weight that is used in
    several places is a sum; one of its terms may overflow a power of two earlier."""

    def __contains__(self, exponent: object) -> bool:
        return isinstance(exponent, int) and self.lowest <= exponent <= self.highest


@dataclass(frozen=True)
class Overflow:
    """A layer with magnitudes that overflow in a format."""

    kind: str
    layer: str
    share: float
    """Share of its elements that overflow."""
    largest: float
    """Its largest finite magnitude."""


def overflows(rows: Iterable[RangeRow], number_format: FloatFormat) -> tuple[Overflow, ...]:
    """Returns the layers that overflow in a format, the largest share first."""
    overflowing = [
        Overflow(row.kind, row.layer, row.overflowing(number_format) / row.elements, row.largest)
        for row in rows
        if row.overflowing(number_format)
    ]
    return tuple(sorted(overflowing, key=lambda overflow: (-overflow.share, -overflow.largest)))


def loss_scale(
    row: RangeRow, number_format: FloatFormat, tolerated: float = TOLERATED
) -> LossScale | None:
    """Returns the loss scales with which a format can represent gradients, or None.

    Args:
        row: Unscaled gradients, pooled.
        number_format: The format.
        tolerated: Tolerated share of nonzero elements that become zero.
    """
    if not row.nonzero:
        return None
    lowest = highest = highest_scale(row, number_format)
    while row.vanishing(number_format, lowest) <= tolerated * row.nonzero:
        lowest -= 1
    return LossScale(lowest + 1, highest) if lowest < highest else None


def highest_scale(row: RangeRow, number_format: FloatFormat) -> int:
    """Returns the exponent of the largest power of two with which no element overflows.

    Args:
        row: Unscaled gradients, not all zero.
        number_format: The format.
    """
    exponent = math.frexp(finite_edge(number_format) / row.largest)[1]
    while math.ldexp(row.largest, exponent) > finite_edge(number_format):
        exponent -= 1
    return exponent


def outermost(layers: Iterable[str]) -> tuple[str, ...]:
    """Returns names of submodules, without those that are inside another one of them.

    >>> outermost(["(input)", "encoder.0.norm", "encoder.0", "head", "head"])
    ('encoder.0', 'head')
    """
    names = dict.fromkeys(name for name in layers if not name.startswith("("))
    return tuple(n for n in names if not any(n.startswith(f"{other}.") for other in names))


def starved_layers(rows: Sequence[RangeRow], number_format: FloatFormat) -> tuple[str, ...]:
    """Returns layers that lose more than `STARVED` of a gradient at the highest loss scale."""
    everything = pooled(rows)
    if everything is None or not everything.nonzero:
        return ()
    scale = highest_scale(everything, number_format)
    starved = [
        row.layer for row in rows if row.vanishing(number_format, scale) > STARVED * row.nonzero
    ]
    return tuple(dict.fromkeys(starved))


def not_finite(report: RangeReport) -> list[RangeRow]:
    """Returns rows with Inf or NaN, except for activations, where a mask may be the cause."""
    return [
        row
        for row in report.rows
        if row.non_finite and (row.kind != "activations" or row.layer == LOSS)
    ]
