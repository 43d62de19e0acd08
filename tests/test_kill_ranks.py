"""Kills a rank twenty times, at random moments of a step and of a save; the run ends exactly."""

import json
import random

import pytest
import torch

from lit_stability import find_last_good
from lit_stability.training_state.good_checkpoints import step_of
from tests import good_rank_cases as cases
from tests.distributed import run_ranks

KILLS = 20
STEPS = 400

pytestmark = pytest.mark.long


def run(results, *args):
    results.mkdir(parents=True)
    return run_ranks(*args, folder=results)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_run_with_twenty_kills_ends_like_the_uninterrupted_one(tmp_path, sharded, capsys):
    straight = run(tmp_path / "r", cases.fitted, tmp_path / "straight", sharded, {"steps": STEPS})
    draw, lost, kills = random.Random(5), [], 0
    root, progress = tmp_path / "run", tmp_path / "progress.json"
    root.mkdir()
    after = None
    for attempt in range(2 * KILLS):
        source = find_last_good(root)
        if attempt:
            reached = json.loads(progress.read_text())
            lost.append(reached - (0 if source is None else step_of(source)))
        # The last attempts may finish.
        kill = cases.KILLS_AT[draw.randrange(len(cases.KILLS_AT))] if kills < KILLS else None
        # Rank 0 alone gives a folder its name.
        rank = 0 if kill in ("flush", "prune") else draw.randrange(2)
        plan = {"at": kill, "rank": rank, "seconds": draw.uniform(0.2, 0.7)}
        arguments = (cases.killed, root, sharded, plan, str(progress), {"steps": STEPS})
        try:
            after = run(tmp_path / f"results {attempt}", *arguments)
            break
        except AssertionError:  # of `run_ranks`: a rank has left no result
            kills += 1
    assert after is not None
    for a, b in zip(straight, after, strict=True):
        assert b["error"] is None
        assert torch.equal(a["weights"], b["weights"])
        assert torch.equal(a["rng"], b["rng"])
    assert kills == KILLS
    with capsys.disabled():
        print(f"\n{kills} kills, steps lost: {sorted(lost)}")
