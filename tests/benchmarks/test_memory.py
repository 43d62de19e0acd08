"""The benchmark of memory: what it leaves out, and that prediction and measurement meet."""

import sys

import pytest

from benchmarks import memory
from benchmarks.memory import Case, measure, report

GIB = 2**30


def test_case_that_would_take_too_much_is_left_out_with_the_reason(monkeypatch):
    """Weights, gradients and moments of 16 GB, and 12 GB for each of three copies."""
    monkeypatch.setattr(memory, "free_on_host", lambda: 100 * GIB)
    assert measure(Case(1000), "cpu", most=8) == "not run: takes 48.4 GiB, more than 8192.0 MiB"
    monkeypatch.setattr(memory, "free_on_host", lambda: 50 * GIB)
    assert measure(Case(1000), "cpu", most=64) == "not run: takes 48.4 GiB, more than 30.0 GiB"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case(10), "10M float32 AdamW"),
        (Case(10, frozen=True), "10M float32 AdamW, 9 of 10 frozen"),
        (Case(10, "SGD", "bfloat16"), "10M bfloat16 SGD"),
        (Case(10, snapshot_device="host"), "10M float32 AdamW, snapshots on the host"),
        (Case(10, checkpoint=False), "10M float32 AdamW, without LastKnownGood"),
    ],
)
def test_table_shows_both_numbers_and_their_ratio(case, name):
    keys = ("predicted_device", "predicted_host", "measured_device", "measured_host", "bare")
    found = dict(zip(keys, (GIB, GIB, GIB, 2 * GIB, GIB), strict=True))
    table = report({case: found, Case(1): "not run: why"}, "cpu")
    assert table.rows[0] == [name, "1024.0 MiB", "2048.0 MiB", "3072.0 MiB", "x1.500"]
    assert table.rows[1][1] == "not run: why"


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_measured_memory_is_what_was_predicted():
    found = measure(Case(20, checkpoint=False), "cpu", most=8)
    predicted = found["predicted_device"] + found["predicted_host"]
    assert found["measured_host"] == pytest.approx(predicted, rel=0.1)
