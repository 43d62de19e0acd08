"""The report in words."""

import pytest
import torch

from lit_stability.checks.precision_ranges import format_report, measure_ranges
from tests.checks.precision_ranges.examples import Twins, mean_square, report_of, row_of


def test_table_begins_with_the_verdicts_and_the_worst_row():
    """S9."""
    report = measure_ranges(Twins(), mean_square, [torch.randn(8, 4)])
    lines = format_report(report).splitlines()
    assert lines[0] == "float16: overflows"
    assert "bfloat16: fits" in lines
    assert any("fp32_modules=['hot']" in line for line in lines)
    head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    assert lines[head + 1].split()[0] == "hot"
    assert lines[-1] == "measured in float32 over 1 batch"


def test_table_is_bounded_unless_all_is_asked_for():
    report = report_of(*(row_of([1.0], "weights", f"layer{i}") for i in range(30)))
    assert sum("weights" in line for line in format_report(report).splitlines()) == 15
    assert "15 more rows; measured in float32" in format_report(report)
    assert sum("weights" in line for line in format_report(report, None).splitlines()) == 30
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        format_report(report, 0)


def test_column_with_nothing_in_it_is_left_out():
    text = format_report(report_of(row_of([1.0, 1e6], "weights")))
    assert "fp16 overflow" in text
    assert "zero" not in text.replace("above zero", "").replace("become zero", "")
    assert "bf16 overflow" not in text


def test_table_names_what_is_not_finite_in_float32():
    rows = [row_of([float("nan"), 1.0], "activations", f"bad{i}") for i in range(7)]
    text = format_report(report_of(row_of([1.0], "weights", "good"), *rows))
    assert "note: values are Inf or NaN in float32 [finite]\n" in text
    assert "  where: bad0, bad1, bad2, bad3 and 3 more\n" in text
    weights = row_of([float("nan"), 1.0], "weights", "head")
    assert "error: values are Inf or NaN in float32 [finite]\n" in format_report(report_of(weights))


def test_table_lists_few_of_many_layers_that_overflow():
    rows = [row_of([1e6 + i], "activations", f"block.{i}") for i in range(9)]
    text = format_report(report_of(*rows))
    assert "    activations of block.8: 100%, up to 1e+06\n" in text
    assert "    and 4 more\n" in text
