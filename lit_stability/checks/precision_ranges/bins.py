"""The bins in which magnitudes are counted.

A bin excludes its lower edge and includes its upper edge. The edges are the powers of two of
float32 and, for each format, the largest float32 that rounds to zero, to a subnormal number, and to
a finite number. The share of a tensor that a cast would lose is therefore an exact sum of bins.
Imports only the formats.
"""

from __future__ import annotations

import math
import struct

from lit_stability.measurement.float_formats import (
    BFLOAT16,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    FloatFormat,
)

JUDGED = (FLOAT16, BFLOAT16, FLOAT8_E5M2, FLOAT8_E4M3FN)
"""The formats that a report can be judged by."""
_LOWEST, _HIGHEST = -149, 127


def zero_edge(number_format: FloatFormat) -> float:
    """Returns the largest magnitude that rounds to zero."""
    return number_format.zero_limit


def subnormal_edge(number_format: FloatFormat) -> float:
    """Returns the largest float32 that rounds to a subnormal number."""
    return _float32_below(number_format.subnormal_limit)


def finite_edge(number_format: FloatFormat) -> float:
    """Returns the largest float32 that does not overflow.

    >>> finite_edge(FLOAT16), finite_edge(FLOAT8_E4M3FN)
    (65519.99609375, 464.0)
    """
    limit = number_format.overflow_limit
    return _float32_below(limit) if number_format.overflows(limit) else limit


def square_edge(number_format: FloatFormat) -> float:
    """Returns the largest float32 whose square rounds to zero.

    >>> square_edge(FLOAT16) ** 2 <= FLOAT16.zero_limit
    True
    """
    return _float32_below(math.nextafter(math.sqrt(number_format.zero_limit), math.inf))


def _float32_below(value: float) -> float:
    """Returns the largest float32 below a positive value; positive floats sort like their bits."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    (nearest,) = struct.unpack("<f", struct.pack("<I", bits))
    (below,) = struct.unpack("<f", struct.pack("<I", bits - 1))
    return float(nearest if nearest < value else below)


def _edges() -> tuple[float, ...]:
    powers = {math.ldexp(1.0, exponent) for exponent in range(_LOWEST, _HIGHEST + 1)}
    of_formats = {
        edge(number_format)
        for number_format in JUDGED
        for edge in (zero_edge, subnormal_edge, finite_edge, square_edge)
    }
    return tuple(sorted({0.0, FLOAT32.largest} | powers | of_formats))


EDGES = _edges()
"""Upper edges of the bins, all float32 values; the first bin counts zeros."""
N_BINS = len(EDGES) + 1
"""One more than the edges: the last bin counts Inf and NaN."""


def exponent_of(upper_edge: float) -> int:
    """Returns the exponent ``k`` for which a bin with this edge lies in ``(2**(k - 1), 2**k]``.

    >>> exponent_of(4.0), exponent_of(3.0), exponent_of(FLOAT32.largest)
    (2, 2, 128)
    """
    mantissa, exponent = math.frexp(upper_edge)
    return exponent - 1 if mantissa == 0.5 else exponent
