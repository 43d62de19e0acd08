"""Sizes in bytes as users write them."""

import pytest

from lit_stability.training_state.byte_sizes import as_text, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (2**40, 2**40),
        ("123", 123),
        ("4 GiB", 4 * 2**30),
        ("4GiB", 4 * 2**30),
        (" 4  gib ", 4 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5 kB", 1500),
        ("2 TiB", 2 * 2**40),
        ("10 B", 10),
    ],
)
def test_size_is_read_in_each_unit(text, size):
    assert parse_bytes("memory_budget", text) == size


NO_SIZES = [
    *("", "GiB", "-1 GiB", "4 gigs", "4 GiB/s", "1e9", "4,5 GB", "nan", "0 GiB", "0.1 B"),
    *(0, -5, True, 1.5, 4e9, None, b"4 GiB"),
]


@pytest.mark.parametrize("value", NO_SIZES)
def test_value_that_is_no_size_is_refused_with_the_value(value):
    with pytest.raises(ValueError, match="memory_budget must be bytes as a whole") as error:
        parse_bytes("memory_budget", value)
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 KiB"), (2**20, "1.0 MiB"), (10 * 2**30 - 1, "10240.0 MiB"), (10 * 2**30, "10.0 GiB")],
)
def test_size_is_printed_in_the_unit_that_fits(size, text):
    assert as_text(size) == text
