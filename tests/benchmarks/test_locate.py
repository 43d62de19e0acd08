"""Finders are asked the same, and judged by what they speak of."""

import pytest

from benchmarks.finders import FINDERS, Told
from benchmarks.locate import BENIGN, CAUSES, alarms, asked, counts, judged, marks

EXPECTED = {"module": "block", "op": "linear", "line": 7}


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (None, ["-", "-", "-"]),
        (Told("block", "linear", 7), ["right", "right", "right"]),
        (Told(None, "Addmm", 8), ["-", "right", "wrong"]),
        (Told("", None, None), ["wrong", "-", "-"]),
        (Told(None, "Pow", None), ["-", "wrong", "-"]),
    ],
)
def test_marks_tell_right_and_wrong_from_what_is_not_told(told, found):
    assert [*marks(told, EXPECTED).values()] == found


def test_selected_steps_exist():
    bad, healthy = asked()
    assert set(CAUSES) <= set(bad)
    assert set(BENIGN) <= set(healthy)
    assert (len(CAUSES), len(BENIGN)) == (8, 5)


def test_finders_tell_what_their_documentation_says_they_do():
    """S15: a fully masked row is seen by all three, each in its own terms."""
    pytest.importorskip("transformers")
    table = judged(["softmax_of_a_fully_masked_row", "epsilon_outside_of_the_root"])
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
    """S15: the others have one each, of what their hooks see on the way."""
    pytest.importorskip("transformers")
    said = alarms(BENIGN)
    assert said["locate_nonfinite"] == []
    assert said["detect_anomaly"] == ["slope_that_a_hook_mends"]
    assert said["DebugUnderflowOverflow"] == ["logits_that_a_module_masks"]
