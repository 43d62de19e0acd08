"""What a format could not hold of a model: overflows, gradients that vanish, the loss scales left.

A loss scale is a power of two that multiplies the loss and so every gradient (Micikevicius et al.
2018, section 3.2). Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_stability.checks.precision_ranges.bins import finite_edge
from lit_stability.checks.precision_ranges.report import LOSS, RangeReport, RangeRow, pooled
from lit_stability.measurement.float_formats import FloatFormat

TOLERATED = 1e-3
"""Share of the gradients' elements above zero that may become zero, over the whole model."""
STARVED = 0.1
"""Share from which on a layer that loses it is named."""


@dataclass(frozen=True)
class LossScale:
    """The powers of two that a loss can be multiplied by, as exponents, both ends included.

    The loss itself is taken to be computed in float32, as 16-mixed does with the losses of torch.
    """

    lowest: int
    """Below it too many elements become zero."""
    highest: int
    """Above it the largest element overflows. Of a weight used in several places the gradient was
    measured as a sum, of which a part may overflow a power of two earlier."""

    def __contains__(self, exponent: object) -> bool:
        return isinstance(exponent, int) and self.lowest <= exponent <= self.highest


@dataclass(frozen=True)
class Overflow:
    """One layer that a format cannot hold."""

    kind: str
    layer: str
    share: float
    """Of all elements, those that overflow."""
    largest: float


def overflows(rows: Iterable[RangeRow], each: FloatFormat) -> tuple[Overflow, ...]:
    """The layers that a format cannot hold, the largest share first."""
    found = [
        Overflow(row.kind, row.layer, row.overflowing(each) / row.elements, row.largest)
        for row in rows
        if row.overflowing(each)
    ]
    return tuple(sorted(found, key=lambda one: (-one.share, -one.largest)))


def loss_scale(row: RangeRow, each: FloatFormat, tolerated: float = TOLERATED) -> LossScale | None:
    """The loss scales under which a format holds gradients; None where there is none.

    Args:
        row: unscaled gradients, pooled.
        each: the format.
        tolerated: share of the elements above zero that may become zero.
    """
    if not row.nonzero:
        return None
    lowest = highest = highest_scale(row, each)
    while row.vanishing(each, lowest) <= tolerated * row.nonzero:
        lowest -= 1
    return LossScale(lowest + 1, highest) if lowest < highest else None


def highest_scale(row: RangeRow, each: FloatFormat) -> int:
    """Exponent of the largest power of two under which no element overflows.

    Args:
        row: unscaled gradients, not all of them zero.
        each: the format.
    """
    exponent = math.frexp(finite_edge(each) / row.largest)[1]
    while math.ldexp(row.largest, exponent) > finite_edge(each):
        exponent -= 1
    return exponent


def outermost(layers: Iterable[str]) -> tuple[str, ...]:
    """Names of submodules, without those that lie inside another one named.

    >>> outermost(["(input)", "encoder.0.norm", "encoder.0", "head", "head"])
    ('encoder.0', 'head')
    """
    names = dict.fromkeys(name for name in layers if not name.startswith("("))
    return tuple(n for n in names if not any(n.startswith(f"{other}.") for other in names))


def starved_layers(rows: Sequence[RangeRow], each: FloatFormat) -> tuple[str, ...]:
    """Layers that lose more than `STARVED` of a gradient even at the highest loss scale."""
    everything = pooled(rows)
    if everything is None or not everything.nonzero:
        return ()
    at = highest_scale(everything, each)
    found = [row.layer for row in rows if row.vanishing(each, at) > STARVED * row.nonzero]
    return tuple(dict.fromkeys(found))


def not_finite(report: RangeReport) -> list[RangeRow]:
    """Rows with Inf or NaN where no mask can have put it, as it may have among activations."""
    return [
        row
        for row in report.rows
        if row.non_finite and (row.kind != "activations" or row.layer == LOSS)
    ]
