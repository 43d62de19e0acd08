"""What was measured: the magnitudes of each layer, and what a format would make of them.

Counts and floats only; imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

from lit_stability.checks.precision_ranges.bins import (
    EDGES,
    JUDGED,
    exponent_of,
    finite_edge,
    square_edge,
    subnormal_edge,
    zero_edge,
)
from lit_stability.measurement.float_formats import FloatFormat

Kind = Literal["weights", "activations", "weight gradients", "activation gradients"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INPUT, LOSS, ROOT = "(input)", "(loss)", "(model)"
"""Rows that are no submodule: the batch, what the step returns, the model itself."""


@dataclass(frozen=True)
class RangeRow:
    """The magnitudes of one kind of value in one layer, over all batches.

    >>> counts = [0] * len(EDGES) + [0]
    >>> counts[EDGES.index(0.0)], counts[EDGES.index(1.0)], counts[EDGES.index(2.0**20)] = 2, 5, 3
    >>> row = RangeRow("activations", "head", tuple(counts), smallest=0.75, largest=1e6)
    >>> row.elements, row.zeros, row.overflowing(JUDGED[0]), row.exponents()
    (10, 2, 3, {0: 5, 20: 3})
    """

    kind: Kind
    layer: str
    """Name of the submodule, as in ``named_modules()``, or one in parentheses."""
    counts: tuple[int, ...]
    """Elements in each bin of `EDGES`; those that are not finite come last."""
    smallest: float
    """Smallest magnitude above zero; 0 where there is none."""
    largest: float
    """Largest finite magnitude."""

    @property
    def elements(self) -> int:
        """Elements counted, over all batches."""
        return sum(self.counts)

    @property
    def zeros(self) -> int:
        """Elements that are zero."""
        return self.counts[0]

    @property
    def non_finite(self) -> int:
        """Elements that are Inf or NaN in float32 already."""
        return self.counts[-1]

    @property
    def nonzero(self) -> int:
        """Finite elements other than zero."""
        return self.elements - self.zeros - self.non_finite

    @property
    def median(self) -> float:
        """Median of the magnitudes above zero, to a factor of 1.5: the middle of its bin."""
        if not self.nonzero:
            return 0.0
        half = self.zeros + (self.nonzero + 1) // 2
        index = next(i for i, n in enumerate(accumulate(self.counts)) if n >= half)
        middle = math.sqrt(EDGES[index - 1]) * math.sqrt(EDGES[index])
        return min(max(middle, self.smallest), self.largest)

    def overflowing(self, each: FloatFormat) -> int:
        """Finite elements that round beyond the format's largest number."""
        return self.elements - self.non_finite - self._at_most(finite_edge(each))

    def subnormal(self, each: FloatFormat) -> int:
        """Elements that round to a subnormal number, and lose bits."""
        return self._at_most(subnormal_edge(each)) - self._at_most(zero_edge(each))

    def vanishing(self, each: FloatFormat, scale: int = 0) -> int:
        """Elements other than zero that round to zero.

        Args:
            each: the format.
            scale: exponent of a power of two that the values are multiplied by first.
        """
        return max(0, self._at_most(zero_edge(each) * 2.0**-scale) - self.zeros)

    def squares_vanishing(self, each: FloatFormat) -> int:
        """Elements other than zero whose square rounds to zero."""
        return self._at_most(square_edge(each)) - self.zeros

    def exponents(self) -> dict[int, int]:
        """How many elements lie in ``(2**(k - 1), 2**k]``, by ``k``."""
        found: dict[int, int] = {}
        for edge, count in zip(EDGES[1:], self.counts[1:-1], strict=True):
            if count:
                found[exponent_of(edge)] = found.get(exponent_of(edge), 0) + count
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the shares of every format."""
        formats = {
            each.name: {
                "overflow": self.overflowing(each),
                "subnormal": self.subnormal(each),
                "to_zero": self.vanishing(each),
            }
            for each in JUDGED
        }
        return {
            "kind": self.kind,
            "layer": self.layer,
            "elements": self.elements,
            "zeros": self.zeros,
            "non_finite": self.non_finite,
            "smallest": self.smallest,
            "median": self.median,
            "largest": self.largest,
            "exponents": {str(k): n for k, n in self.exponents().items()},
            "formats": formats,
        }

    def _at_most(self, edge: float) -> int:
        return sum(self.counts[: bisect_right(EDGES, edge)])


@dataclass(frozen=True)
class RangeReport:
    """What a model spans in training, measured in float32 whatever it is stored in."""

    rows: tuple[RangeRow, ...]
    """In the order of the model, the kinds of `KINDS` one after the other."""
    layers: tuple[str, ...]
    """Names of all layers that have a row, in the order of the model."""
    batches: int
    """Batches measured."""
    adam_epsilon: float = 1e-8
    """What Adam adds to the root of the second moment; torch's default where none was seen."""

    def of(self, *kinds: Kind) -> tuple[RangeRow, ...]:
        """The rows of some kinds."""
        return tuple(row for row in self.rows if row.kind in kinds)

    def row(self, kind: Kind, layer: str) -> RangeRow:
        """One row.

        Raises:
            KeyError: if there is none.
        """
        for row in self.rows:
            if (row.kind, row.layer) == (kind, layer):
                return row
        raise KeyError(f"no {kind} of {layer!r}; there are {[r.layer for r in self.of(kind)]}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": 1,
            "measured_in": "float32",
            "batches": self.batches,
            "adam_epsilon": self.adam_epsilon,
            "rows": [row.as_dict() for row in self.rows],
        }


def pooled(rows: Sequence[RangeRow]) -> RangeRow | None:
    """The rows in one, under the name of the first; None where there is none."""
    if not rows:
        return None
    counts = tuple(sum(column) for column in zip(*(row.counts for row in rows), strict=True))
    smallest = min((row.smallest for row in rows if row.smallest), default=0.0)
    largest = max(row.largest for row in rows)
    return RangeRow(rows[0].kind, rows[0].layer, counts, smallest, largest)
