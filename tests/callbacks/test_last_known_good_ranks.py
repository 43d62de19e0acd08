"""`LastKnownGood` on several ranks: what they write together, and what a resume makes of it."""

import json
import shutil

import pytest
import torch

from lit_stability import find_last_good
from lit_stability.training_state.good_checkpoints import good_files, step_of
from tests import good_rank_cases as cases
from tests.distributed import run_ranks

SHARDED = pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
SHARDED_LONG = pytest.mark.parametrize(
    "sharded", [False, pytest.param(True, marks=pytest.mark.long)], ids=["ddp", "fsdp2"]
)


def run(root, function, *args, ranks=2):
    """What the ranks of a fit in this folder return."""
    results = root.with_name(f"{root.name} results")
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    return run_ranks(function, root, *args, ranks=ranks, folder=results)


def fitted(root, sharded, *, ranks=2, **options):
    return run(root, cases.fitted, sharded, options, ranks=ranks)


def ended(root, sharded, step=29, *, how="raise", who=(0, 1), ranks=2, **options):
    return run(root, cases.ended, sharded, step, how, who, options, ranks=ranks)


def resumed(root, sharded, *, ranks=2, **options):
    return run(root, cases.resumed, sharded, options, ranks=ranks)


def killed(root, sharded, step, who=(0, 1), **options):
    with pytest.raises(AssertionError, match="or died"):
        ended(root, sharded, step, how="kill", who=who, **options)


def steps(root):
    return [step_of(path) for path in good_files(root / "good")]


def assert_equal(straight, after):
    """Every rank has what it has without an interruption."""
    for rank, (a, b) in enumerate(zip(straight, after, strict=True)):
        assert b["error"] is None
        assert torch.equal(a["weights"], b["weights"]), f"weights of rank {rank}"
        assert torch.equal(a["rng"], b["rng"]), f"generator of rank {rank}"
        assert a["order"][-len(b["order"]) :] == b["order"], f"samples of rank {rank}"
        assert a["epochs"][-len(b["epochs"]) :] == b["epochs"], f"metrics of rank {rank}"
        for name, buffer in a["buffers"].items():
            assert torch.equal(buffer, b["buffers"][name]), f"{name} of rank {rank}"


@SHARDED_LONG
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.long, id="every batch"),
        pytest.param({"options": {"accumulate_grad_batches": 2}, "steps": 30}, id="accumulated"),
    ],
)
def test_resume_after_an_exception_ends_like_the_uninterrupted_run(tmp_path, sharded, options):
    straight = fitted(tmp_path / "straight", sharded, **options)
    ended(tmp_path / "run", sharded, 21, **options)
    after = resumed(tmp_path / "run", sharded, **options)

    assert_equal(straight, after)
    assert 0 < len(after[0]["order"]) < len(straight[0]["order"])
    assert any("the data continue with the next batch" in line for line in after[0]["log"])


@SHARDED_LONG
def test_short_fit_leaves_a_trained_checkpoint_from_which_it_goes_on_exactly(tmp_path, sharded):
    straight = fitted(tmp_path / "straight", sharded, good={"every_n_steps": 500})
    fitted(tmp_path / "run", sharded, steps=35, good={"every_n_steps": 500})
    assert steps(tmp_path / "run")[-1] == 20

    assert_equal(straight, resumed(tmp_path / "run", sharded, good={"every_n_steps": 500}))


@SHARDED_LONG
def test_resume_after_one_rank_was_killed_ends_like_the_uninterrupted_run(tmp_path, sharded):
    straight = fitted(tmp_path / "straight", sharded)
    killed(tmp_path / "run", sharded, 26, who=(1,))

    assert_equal(straight, resumed(tmp_path / "run", sharded))


@SHARDED_LONG
def test_resume_after_a_signal_to_one_rank_ends_like_the_uninterrupted_run(tmp_path, sharded):
    straight = fitted(tmp_path / "straight", sharded)
    first = run(tmp_path / "run", cases.preempted, sharded, {"good": {"every_n_steps": 30}})

    assert [result["error"] for result in first] == ["exit 143"] * 2
    assert [path.name for path in (tmp_path / "run" / "preempted").iterdir()] == ["step=00000021"]
    after = run(tmp_path / "run", cases.after_preemption, sharded, {})
    assert len(after[0]["order"]) == 19
    assert_equal(straight, after)


def test_buffers_that_the_ranks_do_not_share_are_restored_on_each(tmp_path):
    options = {"broadcast_buffers": False}
    straight = fitted(tmp_path / "straight", False, **options)
    mean = [result["buffers"]["net.1.running_mean"] for result in straight]
    assert not torch.equal(*mean)
    ended(tmp_path / "run", False, **options)

    assert_equal(straight, resumed(tmp_path / "run", False, **options))


@SHARDED_LONG
def test_more_or_fewer_ranks_go_on_after_the_samples_that_were_trained_on(tmp_path, sharded):
    first = ended(tmp_path / "run", sharded, 26)
    shutil.copytree(tmp_path / "run", tmp_path / "more")
    saved = steps(tmp_path / "run")[-1]
    taken = {i for result in first for batch in result["order"][12 * 2 : saved] for i in batch}

    more = resumed(tmp_path / "more", sharded, ranks=4, batch_size=2, steps=saved + 3)
    fewer = resumed(tmp_path / "run", sharded, ranks=1, batch_size=8, steps=saved + 3)

    for after in (more, fewer):
        assert all(result["error"] is None for result in after)
        new = [i for result in after for batch in result["order"] for i in batch]
        assert len(new) == len(set(new)) == 24
        assert not taken & set(new)
        assert any("was saved by 2 ranks" in line for line in after[0]["log"])


def test_other_ranks_are_refused_where_samples_fill_no_whole_batch(tmp_path):
    ended(tmp_path / "run", False, 21)

    (result,) = resumed(tmp_path / "run", False, ranks=1, batch_size=11)

    assert "saved by 2 ranks after" in result["error"]
    assert "no whole number of batches of 11" in result["error"]
    assert "resume with 2, or" in result["error"]


@SHARDED_LONG
@pytest.mark.parametrize("fault", ["disk of rank 1", "weight of rank 1", "hook of rank 1"])
def test_all_ranks_give_up_a_copy_that_one_of_them_cannot_write(tmp_path, sharded, fault):
    results = run(tmp_path / "run", cases.faulty, sharded, fault, {})

    assert all(result["error"] is None and result["step"] == 40 for result in results)
    # What one rank cannot write at the first time, all write at the next.
    assert len(steps(tmp_path / "run")) == 2
    assert not list((tmp_path / "run" / "good").glob("*.part"))
    about = [line for line in results[0]["log"] if "no good" in line or "not written" in line]
    assert len(about) == 1
    assert cases.FAULTS[fault] in about[0]
    assert not [line for line in results[1]["log"] if "not written" in line]


@SHARDED
def test_damaged_checkpoint_of_a_rank_is_ignored(tmp_path, sharded):
    fitted(tmp_path, sharded, steps=30)
    older, newer = good_files(tmp_path / "good")
    file = newer / ("__1_0.distcp" if sharded else "rank=1.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    found = find_last_good(tmp_path)

    assert step_of(found) == step_of(older)
    (newer / "rank=1.json").unlink()
    assert step_of(find_last_good(tmp_path)) == step_of(older)
    assert json.loads((older / "rank=0.json").read_text())["world_size"] == 2


def test_checkpoint_of_another_callback_resumes_each_rank_at_its_data(tmp_path):
    straight = fitted(tmp_path / "straight", False, steps=30)
    first = run(tmp_path / "run", cases.saved_by_lightning, False, 18)
    after = run(tmp_path / "run", cases.resumed_from, False, "saved.ckpt", {"steps": 30})

    assert first[0]["step"] == 18
    for rank in (0, 1):
        assert after[rank]["order"] == straight[rank]["order"][18:30]
    assert not torch.equal(after[0]["rng"], after[1]["rng"])
