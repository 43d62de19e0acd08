"""The floating-point formats against torch: the numbers, and what a cast does at the edges."""

import math

import pytest
import torch

from lit_stability.measurement.float_formats import FLOAT8_E4M3FN, FORMATS, TF32

DTYPES = {name: getattr(torch, name) for name in FORMATS if name != "tf32"}
KNOWN = [
    # name, bits, largest, smallest normal, smallest subnormal, epsilon
    ("float16", 16, 65504.0, 2.0**-14, 2.0**-24, 2.0**-10),
    ("bfloat16", 16, 3.3895313892515355e38, 2.0**-126, 2.0**-133, 2.0**-7),
    ("float32", 32, 3.4028234663852886e38, 2.0**-126, 2.0**-149, 2.0**-23),
    ("tf32", 19, 2.0**128 * (1 - 2.0**-11), 2.0**-126, 2.0**-136, 2.0**-10),
    ("float8_e4m3fn", 8, 448.0, 2.0**-6, 2.0**-9, 2.0**-3),
    ("float8_e5m2", 8, 57344.0, 2.0**-14, 2.0**-16, 2.0**-2),
]


@pytest.mark.parametrize(("name", *("bits", "largest", "normal", "subnormal", "epsilon")), KNOWN)
def test_format_has_the_numbers_of_its_standard(name, bits, largest, normal, subnormal, epsilon):
    """S9: the ranges of fp16 and bf16."""
    each = FORMATS[name]
    assert (each.bits, each.largest, each.epsilon) == (bits, largest, epsilon)
    assert (each.smallest_normal, each.smallest_subnormal) == (normal, subnormal)


@pytest.mark.parametrize("name", DTYPES)
def test_format_agrees_with_torch(name):
    info, each = torch.finfo(DTYPES[name]), FORMATS[name]
    assert (each.bits, each.largest, each.epsilon) == (info.bits, info.max, info.eps)
    assert each.smallest_normal == info.smallest_normal


def after_cast(values, name):
    """Values through the format and back."""
    return values.to(DTYPES[name]).double().tolist()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_at_the_edges_is_that_of_a_cast(name, sign):
    """S9: one step below a limit, on it, and above it; between float32s lies float64 alone."""
    each = FORMATS[name]
    dtype = torch.float64 if name == "float32" else torch.float32
    limits = [each.zero_limit, each.subnormal_limit, each.overflow_limit]
    on = torch.tensor(limits, dtype=dtype)
    assert on.tolist() == limits
    values = sign * torch.cat([on.nextafter(on * 0), on, on.nextafter(on * 2)])
    for value, cast in zip(values.tolist(), after_cast(values, name), strict=True):
        if not each.finite_only:
            assert each.overflows(value) == math.isinf(cast)
        assert each.vanishes(value) == (cast == 0)
        assert each.is_subnormal(value) == (0 < abs(cast) < each.smallest_normal)


def test_e4m3_overflows_only_beyond_the_tie_that_goes_down():
    assert not FLOAT8_E4M3FN.overflows(464.0)
    assert FLOAT8_E4M3FN.overflows(math.nextafter(464.0, math.inf))
    (cast,) = after_cast(torch.tensor([1e9]), "float8_e4m3fn")
    assert cast == 448.0 or math.isnan(cast), "the two results that OFP8 allows"


def test_zero_is_neither_lost_nor_subnormal():
    for each in FORMATS.values():
        assert not each.vanishes(0.0)
        assert not each.is_subnormal(0.0)


def test_tf32_has_the_range_of_float32_and_the_epsilon_of_float16():
    assert TF32.smallest_normal == FORMATS["float32"].smallest_normal
    assert TF32.epsilon == FORMATS["float16"].epsilon
