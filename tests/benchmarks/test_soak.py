"""A short soak test: the record and the slope by which the long one is judged."""

import pytest

from benchmarks.soak import MemoryRecorder, faults, record_of, run, slope


def test_record_of_a_soak_has_every_fault_opened_and_closed(tmp_path):
    """S17, invariant 8: nothing is lost, and the event file is whole."""
    run(tmp_path, 200, 40, MemoryRecorder())
    record = record_of(tmp_path)
    assert record["incidents"] == len(faults(200, 40)) == 4
    assert record["lines"] == 8
    assert record["outcomes"] == {"recovered": 4}
    assert record["incidents_in_event_file"] == 4
    assert record["last_scalar_step"] >= 150


def test_faults_of_a_soak_alternate():
    kinds = [type(f).__name__ for f in faults(1000, 100)]
    assert kinds[:5] == ["NanLoss", "ScaleLoss", "CorruptWeight", "CorruptMoment", "NanLoss"]
    assert [f.step for f in faults(1000, 100)] == [*range(100, 1000, 100)]


@pytest.mark.parametrize(
    ("values", "grown"),
    [([100, 50, 7, 7, 7, 7], 0.0), ([0, 0, 10, 20, 30, 40], 10.0), ([5], 0.0)],
)
def test_slope_excludes_the_first_third(values, grown):
    assert slope(values) == pytest.approx(grown)
