"""Floating-point formats: their ranges, and rounding at the limits.

Every number follows from the counts of exponent and mantissa bits: IEEE 754-2019, section 3.3,
and for float8 the OCP 8-bit Floating Point Specification (OFP8), revision 1.0. May import the
standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FloatFormat:
    """A binary format: a sign, an exponent with bias ``2**(e - 1) - 1``, a mantissa.

    A value is rounded to the nearest number of the format, and in a tie to the even one (IEEE
    754-2019, 4.3.1). The result for a magnitude depends on where it lies::

        0 ... zero_limit ... subnormal_limit .................... overflow_limit ...
        becomes zero      subnormal         normal                overflows

    ``zero_limit`` itself becomes zero, and ``subnormal_limit`` itself the smallest normal number.

    >>> FLOAT16.largest, FLOAT16.overflow_limit
    (65504.0, 65520.0)
    >>> FLOAT16.overflows(65519.0), FLOAT16.overflows(-65520.0)
    (False, True)
    >>> FLOAT16.vanishes(1e-8), BFLOAT16.vanishes(1e-8)
    (True, False)
    """

    name: str
    """Name of the torch dtype; ``tf32``, which is none, has NVIDIA's name."""
    exponent_bits: int
    mantissa_bits: int
    """Stored bits, without the implicit leading one."""
    finite_only: bool = False
    """Whether the top exponent holds numbers and one NaN but no infinity (E4M3 of OFP8)."""

    @property
    def bits(self) -> int:
        """Significant bits, including the sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def largest_exponent(self) -> int:
        """Base-2 exponent of `largest`, rounded down."""
        bias: int = 2 ** (self.exponent_bits - 1) - 1
        return bias + self.finite_only

    @property
    def largest(self) -> float:
        """Largest finite number."""
        last_places = 2 if self.finite_only else 1
        return math.ldexp(2.0 - last_places * self.epsilon, self.largest_exponent)

    @property
    def smallest_normal(self) -> float:
        """Smallest number with a full mantissa; smaller ones lose mantissa bits one by one."""
        bias: int = 2 ** (self.exponent_bits - 1) - 1
        return math.ldexp(1.0, 1 - bias)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest number above zero."""
        return self.smallest_normal * self.epsilon

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next number; values closer than half of it round to the same."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def overflow_limit(self) -> float:
        """Half a unit in the last place above `largest`: below it, values still round down."""
        return self.largest + math.ldexp(self.epsilon, self.largest_exponent - 1)

    @property
    def subnormal_limit(self) -> float:
        """Half a unit in the last place below the smallest normal: from here values round up."""
        return self.smallest_normal - self.zero_limit

    @property
    def zero_limit(self) -> float:
        """Half the smallest subnormal number: the largest magnitude that rounds to zero."""
        return self.smallest_subnormal / 2

    def overflows(self, value: float) -> bool:
        """Whether a finite value rounds beyond the largest number.

        IEEE formats turn it into Inf. OFP8 allows NaN, as in torch 2.8, or the largest number, as
        in torch 2.13, where an overflow in a cast to ``float8_e4m3fn`` is silent.
        """
        # `largest` is odd, so a tie rounds up, unless NaN occupies the last place.
        if self.finite_only:
            return abs(value) > self.overflow_limit
        return abs(value) >= self.overflow_limit

    def is_subnormal(self, value: float) -> bool:
        """Whether a value rounds to a subnormal number, which has fewer significant bits."""
        return self.zero_limit < abs(value) < self.subnormal_limit

    def vanishes(self, value: float) -> bool:
        """Whether a value other than zero rounds to zero."""
        return 0.0 < abs(value) <= self.zero_limit


FLOAT32 = FloatFormat("float32", exponent_bits=8, mantissa_bits=23)
TF32 = FloatFormat("tf32", exponent_bits=8, mantissa_bits=10)
"""Format of the factors of a float32 product in tensor cores; never stored, 19 of 32 bits."""
FLOAT16 = FloatFormat("float16", exponent_bits=5, mantissa_bits=10)
BFLOAT16 = FloatFormat("bfloat16", exponent_bits=8, mantissa_bits=7)
FLOAT8_E5M2 = FloatFormat("float8_e5m2", exponent_bits=5, mantissa_bits=2)
FLOAT8_E4M3FN = FloatFormat("float8_e4m3fn", exponent_bits=4, mantissa_bits=3, finite_only=True)

FORMATS = {fmt.name: fmt for fmt in (FLOAT32, TF32, FLOAT16, BFLOAT16, FLOAT8_E5M2, FLOAT8_E4M3FN)}
"""All formats by name, from the widest to the narrowest."""

__all__ = [
    "BFLOAT16",
    "FLOAT8_E4M3FN",
    "FLOAT8_E5M2",
    "FLOAT16",
    "FLOAT32",
    "FORMATS",
    "TF32",
    "FloatFormat",
]
