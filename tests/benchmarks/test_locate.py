"""Finders get the same steps and are graded on the parts that they report."""

import pytest

from benchmarks.finders import FINDERS, Location
from benchmarks.locate import BENIGN, CAUSES, all_steps, counts, false_alarms, grade, grades

EXPECTED = {"module": "block", "op": "linear", "line": 7}


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (None, ["-", "-", "-"]),
        (Location("block", "linear", 7), ["right", "right", "right"]),
        (Location(None, "Addmm", 8), ["-", "right", "wrong"]),
        (Location("", None, None), ["wrong", "-", "-"]),
        (Location(None, "Pow", None), ["-", "wrong", "-"]),
    ],
)
def test_grade_is_right_wrong_or_not_reported(location, expected):
    assert [*grade(location, EXPECTED).values()] == expected


def test_selected_steps_exist():
    bad, benign = all_steps()
    assert set(CAUSES) <= set(bad)
    assert set(BENIGN) <= set(benign)
    assert (len(CAUSES), len(BENIGN)) == (8, 5)


def test_finders_report_what_their_documentation_promises():
    """S15: all three report a fully masked row, each the parts that it knows."""
    pytest.importorskip("transformers")
    table = grades(["softmax_of_a_fully_masked_row", "epsilon_outside_of_the_root"])
    forward, backward = table.values()
    assert {f: [*forward[f].values()] for f in FINDERS} == {
        "locate_nonfinite": ["right", "right", "right"],
        "detect_anomaly": ["-", "right", "right"],
        "DebugUnderflowOverflow": ["right", "-", "-"],
    }
    assert [*backward["DebugUnderflowOverflow"].values()] == ["-", "-", "-"]
    assert counts(table)["DebugUnderflowOverflow"]["noticed"] == 1
    assert counts(table)["locate_nonfinite"] == {"noticed": 2, "module": 2, "op": 2, "line": 2}


def test_benign_steps_raise_no_alarm_in_the_search():
    """S15: the other tools have one each, from intermediate values."""
    pytest.importorskip("transformers")
    alarms = false_alarms(BENIGN)
    assert alarms["locate_nonfinite"] == []
    assert alarms["detect_anomaly"] == ["slope_that_a_hook_mends"]
    assert alarms["DebugUnderflowOverflow"] == ["logits_that_a_module_masks"]
