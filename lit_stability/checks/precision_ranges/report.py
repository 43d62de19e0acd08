"""The measured magnitudes of each layer, and how many of them a format would lose.

Imports neither torch nor Lightning.
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
"""Names of rows that are not submodules: the batch, the returned loss, the model itself."""


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
    """Name of the submodule, as in ``named_modules()``, or a name in parentheses."""
    counts: tuple[int, ...]
    """Number of elements in each bin of `EDGES`, and of non-finite elements last."""
    smallest: float
    """Smallest magnitude above zero; 0 if there is none."""
    largest: float
    """Largest finite magnitude."""

    @property
    def elements(self) -> int:
        """Number of all elements, over all batches."""
        return sum(self.counts)

    @property
    def zeros(self) -> int:
        """Number of elements that are zero."""
        return self.counts[0]

    @property
    def non_finite(self) -> int:
        """Number of elements that are Inf or NaN in float32 already."""
        return self.counts[-1]

    @property
    def nonzero(self) -> int:
        """Number of finite elements other than zero."""
        return self.elements - self.zeros - self.non_finite

    @property
    def median(self) -> float:
        """Median of the magnitudes above zero, within a factor of 1.5: the middle of its bin."""
        if not self.nonzero:
            return 0.0
        half = self.zeros + (self.nonzero + 1) // 2
        index = next(i for i, n in enumerate(accumulate(self.counts)) if n >= half)
        middle = math.sqrt(EDGES[index - 1]) * math.sqrt(EDGES[index])
        return min(max(middle, self.smallest), self.largest)

    def overflowing(self, number_format: FloatFormat) -> int:
        """Returns the number of finite elements that round beyond the format's largest number."""
        return self.elements - self.non_finite - self._at_most(finite_edge(number_format))

    def subnormal(self, number_format: FloatFormat) -> int:
        """Returns the number of elements that round to a subnormal number, and so lose bits."""
        return self._at_most(subnormal_edge(number_format)) - self._at_most(
            zero_edge(number_format)
        )

    def vanishing(self, number_format: FloatFormat, scale: int = 0) -> int:
        """Returns the number of nonzero elements that round to zero.

        Args:
            number_format: The format.
            scale: Exponent of a power of two by which the values are multiplied first.
        """
        return max(0, self._at_most(zero_edge(number_format) * 2.0**-scale) - self.zeros)

    def squares_vanishing(self, number_format: FloatFormat) -> int:
        """Returns the number of nonzero elements whose square rounds to zero."""
        return self._at_most(square_edge(number_format)) - self.zeros

    def exponents(self) -> dict[int, int]:
        """Returns the number of elements in ``(2**(k - 1), 2**k]`` by ``k``."""
        counts: dict[int, int] = {}
        for edge, count in zip(EDGES[1:], self.counts[1:-1], strict=True):
            if count:
                counts[exponent_of(edge)] = counts.get(exponent_of(edge), 0) + count
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, with the losses in every format."""
        formats = {
            number_format.name: {
                "overflow": self.overflowing(number_format),
                "subnormal": self.subnormal(number_format),
                "to_zero": self.vanishing(number_format),
            }
            for number_format in JUDGED
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
    """The magnitudes of a model in training, measured in float32 whatever its own dtype."""

    rows: tuple[RangeRow, ...]
    """Sorted by kind in the order of `KINDS`, then by layer in the order of the model."""
    layers: tuple[str, ...]
    """Names of all layers that have a row, in the order of the model."""
    batches: int
    """Number of measured batches."""
    adam_epsilon: float = 1e-8
    """Epsilon of Adam; torch's default if the optimizer has none."""

    def of(self, *kinds: Kind) -> tuple[RangeRow, ...]:
        """Returns the rows of the given kinds."""
        return tuple(row for row in self.rows if row.kind in kinds)

    def row(self, kind: Kind, layer: str) -> RangeRow:
        """Returns the row of one kind and layer.

        Raises:
            KeyError: If there is no such row.
        """
        for row in self.rows:
            if (row.kind, row.layer) == (kind, layer):
                return row
        raise KeyError(f"no {kind} of {layer!r}; there are {[r.layer for r in self.of(kind)]}")

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "schema": 1,
            "measured_in": "float32",
            "batches": self.batches,
            "adam_epsilon": self.adam_epsilon,
            "rows": [row.as_dict() for row in self.rows],
        }


def pooled(rows: Sequence[RangeRow]) -> RangeRow | None:
    """Returns all rows merged into one, with the name of the first; None without rows."""
    if not rows:
        return None
    counts = tuple(sum(column) for column in zip(*(row.counts for row in rows), strict=True))
    smallest = min((row.smallest for row in rows if row.smallest), default=0.0)
    largest = max(row.largest for row in rows)
    return RangeRow(rows[0].kind, rows[0].layer, counts, smallest, largest)
