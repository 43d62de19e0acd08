"""A run that is killed again and again ends where the run that was left alone ends."""

import os
import random
import signal
import time
from itertools import pairwise

import pytest
import torch

from lit_stability.training_state.good_checkpoints import RunEnd
from tests.distributed import CONTEXT
from tests.kill_cases import CONFIRM, EVERY, train


def start(folder, result):
    """Starts a training process."""
    process = CONTEXT.Process(target=train, args=(folder, result), daemon=True)
    process.start()
    return process


def run(folder, result):
    """Lets one train to its end."""
    folder.mkdir(exist_ok=True)
    process = start(folder, result)
    process.join(120)
    assert process.exitcode == 0, (folder / "output").read_text()
    return torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder, folder / "end.pt")


def diary(folder):
    """What each process noted: where it started, and (step, steps that a write took so far)."""
    runs = []
    path = folder / "diary"
    for line in path.read_text().splitlines() if path.exists() else []:
        match line.split():
            case ["start", step]:
                runs.append((int(step), []))
            case ["step", step, busy]:
                runs[-1][1].append((int(step), int(busy)))
    return runs


def end_by(kind, folder, result, steps, moment=0.0):
    """Starts a process, and sends it a signal so long after so many steps; returns its status."""
    folder.mkdir(exist_ok=True)
    begun = len(diary(folder))
    process = start(folder, result)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        runs = diary(folder)
        if len(runs) > begun and len(runs[-1][1]) >= steps:
            break
        time.sleep(0.002)
    time.sleep(moment)
    os.kill(process.pid, kind)
    process.join(60)
    return process.exitcode


def assert_same(a, b):
    assert a.keys() == b.keys() if isinstance(a, dict) else type(a) is type(b)
    if isinstance(a, dict):
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_little_was_lost(folder):
    """A process starts no further back than a copy is old, counted to the end of its writing."""
    runs = diary(folder)
    for (_, steps), (resumed, _) in pairwise(runs):
        last = steps[-1][0] if steps else 0
        writing = max((busy for _, busy in steps), default=0)
        assert last - resumed <= EVERY + CONFIRM + writing + 1, (last, resumed, writing)


@pytest.mark.parametrize(
    "kills", [8, pytest.param(20, marks=pytest.mark.long)], ids=["eight times", "twenty times"]
)
def test_killed_run_ends_bit_identical_and_loses_few_steps(kills, undisturbed, tmp_path):
    """S11, S12: SIGKILL at random moments, also in the middle of a write."""
    draw = random.Random(kills)
    folder, result = tmp_path / "run", tmp_path / "end.pt"
    for _ in range(kills):
        when = draw.randrange(50), draw.uniform(0.0, 0.01)
        status = end_by(signal.SIGKILL, folder, result, *when)
        assert status == -signal.SIGKILL, "it was still training"
    assert_same(run(folder, result), undisturbed)
    assert len(diary(folder)) == kills + 1
    assert_little_was_lost(folder)


def test_terminated_run_ends_bit_identical_and_loses_no_more(undisturbed, tmp_path):
    """S12: SIGTERM ends the fit at the end of a batch; what was being written is written."""
    folder, result = tmp_path / "run", tmp_path / "end.pt"
    for steps in (28, 51):
        assert end_by(signal.SIGTERM, folder, result, steps) >= 0, "it ends by itself"
        assert not result.exists()
        end = RunEnd.read(folder / "good")
        assert end is not None
        assert end.state == "interrupted"
        assert not list((folder / "good").glob(".part-*"))
    assert_same(run(folder, result), undisturbed)
    assert_little_was_lost(folder)
