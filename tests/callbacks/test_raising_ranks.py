"""One rank raises in its forward pass: all ranks leave the batch out, or end with the exception."""

import pytest
import torch

from tests.distributed import exit_codes, run_ranks, run_ranks_once
from tests.raising_rank_cases import CASES, ENDS, MEMORY, ending, guarded, pairs

IN_CI = ["step 1", "first of a window", "unused parameters"]
LONG = [name for name in CASES if name not in IN_CI]
RETRIED, SKIPPED = "step retried", "step skipped"


def cases(names):
    return [pytest.param(n, id=n.replace(" ", "-")) for n in names]


def check(first, second, name):
    """All ranks did the same, and the run is the one that never met the batch."""
    (left, left_twin), (right, right_twin) = first[name], second[name]
    for key in ("weights", "optimizer"):
        assert torch.equal(left[key], right[key])
    for run, twin in ((left, left_twin), (right, right_twin)):
        assert run["step"] == twin["step"]
        assert run["incidents"] == left["incidents"]
        assert run["messages"] == left["messages"]
        for key in ("weights", "optimizer", "buffers"):
            assert torch.equal(run[key], twin[key])
        assert all(run["freed"])
        assert not run["patched"]
    (incident,) = left["incidents"]
    assert incident[1] == "exception"
    # A batch is retried first, and left out if it fails again.
    times = CASES[name].get("times", 2)
    assert set(incident[4]) == ({RETRIED} if times == 1 else {RETRIED, SKIPPED})
    assert " at raising_rank_cases.py:" in left["messages"][0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks_once(tmp_path_factory, pairs, IN_CI, label="raising")[1]


@pytest.mark.parametrize("name", cases(IN_CI))
def test_batch_that_raises_on_a_rank_is_left_out_exactly_on_all_ranks(name, ranks):
    check(*ranks, name)


def test_incident_names_rank_and_exception(ranks):
    (message,) = ranks[0]["step 1"][0]["messages"]
    assert message.startswith(f"rank 1: OutOfMemoryError: {MEMORY} at raising_rank_cases.py:")


def test_other_ranks_go_on_within_a_second_of_the_exception(ranks):
    run, _ = ranks[1]["step 1"]
    assert len(run["seconds"]) == run["raised"] == 2
    assert max(run["seconds"]) < 1


def test_healthy_steps_call_the_same_collectives_as_without_a_guard(ranks):
    run, twin = ranks[0]["step 1"]
    assert run["calls"][-1] == twin["calls"][-1] == ("all_reduce async", "all_reduce async")


@pytest.mark.long
@pytest.mark.parametrize("name", cases(LONG))
def test_batch_that_raises_on_a_rank_is_left_out_exactly_on_all_ranks_in_rarer_cases(
    name, tmp_path
):
    size = CASES[name].get("fit", {}).get("devices", 2)
    first, *_, last = run_ranks(pairs, tmp_path, [name], ranks=size, folder=tmp_path)
    check(first, last, name)


TOGETHER = {
    "three in a row": ("OutOfMemoryError", MEMORY),
    "first window": ("OutOfMemoryError", MEMORY),
    "value three times": ("ValueError", "Expected parameter loc"),
}
"""Ends of the fit that all ranks know of: class and message of rank 1's exception."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, id=n.replace(" ", "-"), marks=[pytest.mark.long] * (n != "three in a row"))
        for n in TOGETHER
    ],
)
def test_exception_that_is_the_programs_fault_ends_the_fit_on_all_ranks(name, tmp_path):
    kind, message = TOGETHER[name]
    assert exit_codes(ending, tmp_path, name, ranks=2, folder=tmp_path) == [1, 1]
    assert (tmp_path / "error1").read_text().startswith(f"{kind}: {message}")
    assert f"raised on rank 1: {kind}: {message}" in (tmp_path / "error0").read_text()
    # The traceback still leads to the line.
    assert "raise self.make()" in (tmp_path / "output1").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", cases(n for n in ENDS if n not in TOGETHER))
def test_exception_that_others_cannot_be_spared_is_raised_as_it_is(name, tmp_path):
    assert exit_codes(ending, tmp_path, name, ranks=2, folder=tmp_path) == [1, 1]
    kind = "TypeError: unsupported" if name == "type" else f"OutOfMemoryError: {MEMORY}"
    assert (tmp_path / "error1").read_text().startswith(kind)
    assert "raised on rank 1" not in (tmp_path / "error0").read_text()


@pytest.mark.long
def test_ranks_are_guarded_where_forward_and_backward_are_the_same_in_each_step(tmp_path):
    first, second = run_ranks(guarded, tmp_path, folder=tmp_path)
    assert first == second
    assert first == {
        **{"plain": True, "unused parameters": True, "two batches per step": True},
        **{"static graph": False, "sparse gradients": False},
        **{"manual": False, "LBFGS": False, "FSDP2": False},
    }
