"""The benchmark of snapshots: it measures each operation once a round."""

from benchmarks.snapshot import Rounds
from tests.conftest import fit


def test_each_operation_is_timed_once_a_round(tmp_path):
    rounds = Rounds(2)
    fit(tmp_path, [rounds], max_steps=3)
    copies = {"plain copy", "snapshot", "restore", "good checkpoint"}
    assert set(rounds.times) == {*copies, "start of a step"}
    assert {len(times) for times in rounds.times.values()} == {2}
    assert len(rounds.step) == 3
