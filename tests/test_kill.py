"""A run that is killed again and again ends where the run that was left alone ends."""

import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lit_stability.training_state.good_checkpoints import RunEnd
from tests.kill_server import CONFIRM, EVERY

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """The forking process, and what it says of its children."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kill_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def start(self, folder, result):
        """Start a training process; returns its id."""
        folder.mkdir(exist_ok=True)
        self.process.stdin.write(f"{folder} {result}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit status of the process started last; minus the signal that ended it."""
        return int(self.process.stdout.readline())

    def run(self, folder, result):
        """Let one train to its end."""
        self.start(folder, result)
        assert self.wait() == 0, (folder / "output").read_text()
        return torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.stdout.close()
    server.process.wait(timeout=60)


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return server.run(folder, folder / "end.pt")


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


def recur(server, folder, result, kind, steps, moment=0.0):
    """Start a process, and send it a signal so long after so many steps; returns its status."""
    begun = len(diary(folder))
    child = server.start(folder, result)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        runs = diary(folder)
        if len(runs) > begun and len(runs[-1][1]) >= steps:
            break
        time.sleep(0.002)
    time.sleep(moment)
    os.kill(child, kind)
    return server.wait()


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
    "kills", [pytest.param(2, marks=pytest.mark.long), 20], ids=["twice", "twenty times"]
)
def test_killed_run_ends_bit_identical_and_loses_few_steps(kills, server, undisturbed, tmp_path):
    """S11, S12: SIGKILL at random moments, also in the middle of a write."""
    draw = random.Random(kills)
    folder, result = tmp_path / "run", tmp_path / "end.pt"
    for _ in range(kills):
        when = draw.randrange(50), draw.uniform(0.0, 0.01)
        status = recur(server, folder, result, signal.SIGKILL, *when)
        assert status == -signal.SIGKILL, "it was still training"
    assert_same(server.run(folder, result), undisturbed)
    assert len(diary(folder)) == kills + 1
    assert_little_was_lost(folder)


def test_terminated_run_ends_bit_identical_and_loses_no_more(server, undisturbed, tmp_path):
    """S12: SIGTERM ends the fit at the end of a batch; what was being written is written."""
    folder, result = tmp_path / "run", tmp_path / "end.pt"
    for steps in (28, 51):
        assert recur(server, folder, result, signal.SIGTERM, steps) not in (0, -signal.SIGTERM)
        end = RunEnd.read(folder / "good")
        assert end is not None
        assert end.state == "interrupted"
        assert not list((folder / "good").glob(".part-*"))
    assert_same(server.run(folder, result), undisturbed)
    assert_little_was_lost(folder)
