"""The benchmark of causes: known names, and verdicts."""

import pytest

from benchmarks.causes import Row, of_field, summary
from benchmarks.field_causes import FIELD
from lit_stability.diagnosis import CAUSES


def test_causes_of_the_field_cases_are_in_the_catalogue():
    assert {cause for case in FIELD for cause in case.causes} <= set(CAUSES)
    assert len({case.name for case in FIELD}) == len(FIELD)


@pytest.mark.parametrize(
    ("true", "named", "alarms", "verdict"),
    [
        (("a", "b"), "b", 1, "right"),
        (("a", "b"), "c", 1, "wrong"),
        (("a", "b"), "", 1, "unknown"),
        (("a", "b"), "", 0, "silent"),
        ((), "", 1, "right"),
        ((), "a", 1, "wrong"),
    ],
)
def test_verdict_of_a_named_cause(true, named, alarms, verdict):
    assert Row("field", "case", true, named, alarms).verdict == verdict


def test_summary_counts_each_group_and_all():
    rows = [Row("field", "x", ("a",), "a", 1), Row("rescue", "y", ("a",), "b", 1)]
    assert summary(rows) == [
        ["field", "1", "1", "0", "0", "0"],
        ["rescue", "1", "0", "0", "1", "0"],
        ["all", "2", "1", "0", "1", "0"],
    ]


@pytest.mark.parametrize(
    "name",
    ["coefficient that is NaN", "NaN in a row", "equal eigenvalues", "LBFGS on mini-batches"],
)
def test_cause_of_a_field_case_is_named(name):
    (case,) = [each for each in FIELD if each.name == name]
    assert of_field(case).verdict == "right"
