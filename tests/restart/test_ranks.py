"""`fit_with_recovery` on two ranks that torchrun starts, and starts again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_stability.restart.rank_records import RankRecords, RecoveryState
from lit_stability.restart.remedies import Plan
from lit_stability.training_state.good_checkpoints import step_of

PROGRAM = "tests.restart.rank_program"


ROOT = Path(__file__).parents[2]


def torchrun(module, *arguments, cwd=ROOT):
    """The exit code of a module on two ranks, and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--max-restarts=3", "--module", module, *arguments],
        env=os.environ | own,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def recovered(folder, fault, strategy="ddp"):
    """What rank 0 has at the end, the exit code, and what was printed."""
    code, text = torchrun(PROGRAM, str(folder), fault, strategy)
    file = folder / "result.pt"
    return (torch.load(file, weights_only=True) if file.exists() else None), code, text


def records(folder):
    return sorted(folder.glob("recovery-*/attempt=*/*.json"))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_killed_rank_is_restarted_and_the_run_ends_like_the_uninterrupted_one(tmp_path, strategy):
    straight, code, text = recovered(tmp_path / "straight", "none", strategy)
    assert code == 0, text

    after, code, text = recovered(tmp_path / "run", "kill", strategy)

    assert code == 0, text
    assert after["attempt"] == 1
    assert after["steps"] < 40
    assert torch.equal(after["weights"], straight["weights"])
    assert after["remedies"] in ([], ["plain restart"])


@pytest.mark.long
def test_memory_of_one_rank_halves_the_batch_of_all(tmp_path):
    after, code, text = recovered(tmp_path, "memory")

    assert code == 0, text
    assert (after["batch_size"], after["accumulation"]) == (2, 2)
    assert after["remedies"] == ["batch_size 4 -> 2, accumulate_grad_batches 1 -> 2"]
    rows = [json.loads(file.read_text()) for file in records(tmp_path) if "rank=1" in file.name]
    assert rows[0]["state"]["crashes"][-1]["kind"] == "out of memory"
    (line,) = (tmp_path / "recoveries.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "out of memory"


@pytest.mark.long
def test_sample_that_one_rank_cannot_read_leaves_its_batch_out_on_all_ranks(tmp_path):
    after, code, text = recovered(tmp_path, "sample")

    assert code == 0, text
    other = torch.load(tmp_path / "result1.pt", weights_only=True)
    (remedy,) = after["remedies"]
    assert remedy.startswith("batch 9 of epoch 1 is skipped, samples ")
    (line,) = (tmp_path / "recoveries.jsonl").read_text().splitlines()
    resumed_at = step_of(Path(json.loads(line)["checkpoint"]))
    assert resumed_at >= 8
    assert after["steps"] == other["steps"] == 40 - resumed_at
    assert torch.equal(after["weights"], other["weights"])


@pytest.mark.long
def test_nan_on_one_rank_lowers_the_learning_rate_of_all(tmp_path):
    after, code, text = recovered(tmp_path, "nan")

    assert code == 0, text
    assert after["remedies"] == ["learning rate x0.5, clip x0.5"]


@pytest.mark.long
def test_error_that_recurs_ends_all_attempts_with_its_reason(tmp_path):
    after, code, text = recovered(tmp_path, "error always")

    assert (after, code) == (None, 1)
    assert "fit_with_recovery gave up" in text
    assert "deterministic" in text


CONFIG = """
seed: 0
run_dir: runs/a
model: {_target_: lightning.pytorch.demos.boring_classes.BoringModel}
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  max_steps: 12
  limit_train_batches: 20
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
callbacks:
  monitor: {_target_: lit_stability.GradientMonitor}
  good: {_target_: lit_stability.LastKnownGood, every_n_steps: 4, confirm_after: 2}
logger: null
"""


@pytest.mark.long
def test_command_line_resumes_a_run_of_several_ranks(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    program = "lit_stability.cli.main"
    code, text = torchrun(program, "fit", "-c", "small.yaml", cwd=tmp_path)
    assert code == 0, text

    change = "trainer.max_steps=20"
    code, text = torchrun(program, "resume", "runs/a", change, cwd=tmp_path)

    assert code == 0, text
    assert text.count("resuming from the good checkpoint of step") == 1
    assert "the data continue with the next batch" in text
    assert "max_steps=20` reached" in text


def crash(error="KeyError", kind="other", message="x", step=7):
    return {
        **{"attempt": 1, "kind": kind, "error": error, "message": message, "place": "a:1 in f"},
        **{"step": step, "epoch": 0, "batch_idx": 7, "samples": [1, [2, "a"]], "in_a_row": 1},
    }


def test_crash_of_the_rank_that_caused_the_others_is_the_one_that_counts(tmp_path):
    before = RankRecords(tmp_path, 0)
    lost = crash("RuntimeError", message="Connection closed by peer [127.0.0.1]:1")
    for rank, each in ((0, lost), (1, crash())):
        before.crashed(rank, RecoveryState(crashes=[each], lines=[each["message"]]))

    state, ended = RankRecords(tmp_path, 1).state()

    assert ended == "rank 1: x"
    assert state.crashes == [crash()]


def test_attempt_after_one_that_was_killed_goes_on_with_the_last_plan(tmp_path):
    plan = Plan(overrides={"accumulate_grad_batches": 2}, unwanted=[frozenset({3, (4, "a")})])
    plan.seen.add(("KeyError", "a:1 in f", 7))
    state = RecoveryState(plan=plan.to_plain(), crashes=[crash()], lines=["crash 1"])
    RankRecords(tmp_path, 0).crashed(0, state)
    RankRecords(tmp_path, 0).started(tmp_path / "a", None)
    RankRecords(tmp_path, 1).started(tmp_path / "b", (tmp_path / "good", 5))
    now = RankRecords(tmp_path, 2)

    found, ended = now.state()

    assert "without an exception" in ended
    assert Plan.from_plain(RecoveryState.from_json(found.to_json()).plan) == plan
    assert now.folders() == {tmp_path / "a": None, tmp_path / "b": (tmp_path / "good", 5)}


def test_first_attempt_deletes_the_records_of_an_older_run(tmp_path):
    RankRecords(tmp_path / "r", 0).crashed(0, RecoveryState(crashes=[crash()], lines=["crash 1"]))

    RankRecords(tmp_path / "r", 0).begin()

    assert RankRecords(tmp_path / "r", 0).state() == (RecoveryState(), "")
    assert not (tmp_path / "r").exists()
