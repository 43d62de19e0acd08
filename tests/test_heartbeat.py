"""What ranks conclude from each other's heartbeats, on plain numbers."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from lit_stability.distributed.heartbeat import (
    BACKWARD,
    DATA,
    FORWARD,
    OPTIMIZER,
    PHASES,
    Beat,
    Heartbeat,
    allowed_seconds,
)
from lit_stability.distributed.heartbeat_frames import collective_of, is_compiling
from lit_stability.distributed.heartbeat_process import ProcessIdentity
from lit_stability.distributed.heartbeat_stragglers import StragglerWatch
from lit_stability.distributed.heartbeat_verdict import Seen, Verdict, judge

BACK = Beat(number=9, phase="backward", batches=5, events=1, step=4, idle=30, allowed=600)
STILL = replace(BACK, idle=700)
LOADS = Beat(number=9, phase="data", batches=4, events=3, step=4, idle=701, allowed=600)
VALIDATES = replace(LOADS, phase="validation", events=9, allowed=1800)
WORKS = replace(STILL, phase="forward", events=0)
ENDED = replace(LOADS, phase="end", state="ended")
RAISED = replace(BACK, phase="forward", events=0, state="raised", message="ValueError: 17")
WAITS = replace(STILL, phase="data", waits="broadcast")

TABLE = {
    "nobody stands still": ([replace(BACK, idle=0.1), BACK], None),
    "not long enough": ([replace(STILL, idle=599), replace(LOADS, idle=599)], None),
    "stalled loader": ([STILL, LOADS], ("stalled", (1,))),
    "stalled itself": ([LOADS, STILL, STILL], ("stalled", (0,))),
    "two are behind": ([STILL, LOADS, LOADS, STILL], ("stalled", (1, 2))),
    "behind, but at work": ([STILL, replace(LOADS, idle=3)], None),
    "behind, in a validation": ([STILL, VALIDATES], None),
    "behind, in a validation for long": (
        [replace(STILL, idle=1900), replace(VALIDATES, idle=1900)],
        ("stalled", (1,)),
    ),
    "same place": ([STILL, STILL], ("deadlock", ())),
    "same place, first steps": ([STILL, replace(STILL, allowed=1800)], None),
    "same place, one waits": ([replace(WORKS, waits="all_reduce"), WORKS], ("stalled", (1,))),
    "raised": ([BACK, Seen(RAISED, over_for=6)], ("raised", (1,))),
    "raised just now": ([BACK, Seen(RAISED, over_for=4)], None),
    "raised, and this one gets on": ([replace(BACK, idle=1), Seen(RAISED, over_for=60)], None),
    "raised, and this one is at work": ([replace(WORKS, idle=50), Seen(RAISED, over_for=50)], None),
    "raised, and this one validates": (
        [replace(VALIDATES, idle=700), Seen(RAISED, over_for=700)],
        None,
    ),
    "raised itself": ([RAISED, Seen(BACK, silent=900, gone=True, over_for=900)], None),
    "gone": ([BACK, Seen(BACK, gone=True, over_for=6)], ("died", (1,))),
    "gone, after an exception": ([BACK, Seen(RAISED, gone=True, over_for=6)], ("raised", (1,))),
    "gone, after its last batch": ([BACK, Seen(ENDED, gone=True, over_for=6)], ("died", (1,))),
    "silent": ([replace(STILL, idle=130), Seen(BACK, silent=121)], ("silent", (1,))),
    "silent, not long enough": ([replace(STILL, idle=130), Seen(BACK, silent=119)], None),
    "silent, first batches": (
        [replace(STILL, idle=130), Seen(replace(BACK, batches=2), silent=121)],
        None,
    ),
    "silent, and this one gets on": ([replace(BACK, idle=1), Seen(BACK, silent=500)], None),
    "fewer batches": ([STILL, ENDED], ("left", (1,))),
    "as many batches, but this one waits": ([replace(WAITS, batches=4), ENDED], ("left", (1,))),
    "this one does not come to the end": ([LOADS, ENDED], ("stalled", (0,))),
    "in its last hook": ([replace(ENDED, state="running", idle=9e9), ENDED], None),
}


@pytest.mark.parametrize("name", TABLE)
def test_verdict_of_a_rank(name):
    ranks, expected = TABLE[name]
    seen = {r: s if isinstance(s, Seen) else Seen(s) for r, s in enumerate(ranks)}
    verdict = judge(0, seen, silent_after=120, slow_factor=3)
    assert (verdict and (verdict.kind, verdict.ranks)) == expected
    if verdict:
        assert Verdict.from_text(verdict.to_text()) == verdict


def test_verdict_is_reported_by_the_lowest_living_rank():
    ranks = {0: Seen(BACK, gone=True, over_for=9), 1: Seen(BACK), 2: Seen(BACK)}
    verdict = judge(2, ranks, 120, 3)
    assert (verdict.reporter, verdict.living) == (1, 2)


def test_beat_survives_the_store():
    assert Beat.from_text(RAISED.to_text().encode()) == RAISED
    assert Beat.from_text(b"") == Beat()


@pytest.mark.parametrize(
    ("beat", "longest", "expected"),
    [
        (BACK, 1.0, 600),
        (replace(BACK, batches=2), 1.0, 1800),
        (VALIDATES, 1.0, 1800),
        (replace(BACK, phase="compiling"), 1.0, 1800),
        (replace(BACK, phase="compiling", waits="barrier"), 1.0, 600),
        (BACK, 400.0, 1200),
        (BACK, 4000.0, 1800),
    ],
)
def test_time_allowed_is_longer_where_work_takes_long(beat, longest, expected):
    heart = Heartbeat()
    heart.enter(BACKWARD)
    heart.longest[BACKWARD] = longest
    assert allowed_seconds(heart, beat, 600, 3) == expected


def test_heartbeat_adds_up_the_time_of_each_phase():
    heart = Heartbeat()
    heart.enter(DATA)
    time.sleep(0.02)
    heart.begin_batch()
    heart.enter(BACKWARD)
    assert 0.02 <= heart.totals[DATA] < 0.2
    assert heart.totals[FORWARD] < 0.02
    assert heart.longest[DATA] == heart.totals[DATA]
    assert heart.place == (1, 1, BACKWARD)


class Run:
    """Ranks that train together: beats after some batches, from seconds per batch in each phase."""

    def __init__(self, *ranks):
        self.ranks, self.batches, self.totals = ranks, 0, [[0.0] * len(PHASES) for _ in ranks]

    def go(self, batches):
        self.batches += batches
        slowest = max(data + forward for data, forward in self.ranks)
        for totals, (data, forward) in zip(self.totals, self.ranks, strict=True):
            # The others wait in their backward pass.
            for phase, seconds in {
                DATA: data,
                FORWARD: forward,
                BACKWARD: 0.05 + slowest - data - forward,
                OPTIMIZER: 0.01,
            }.items():
                totals[phase] += batches * seconds
        return {r: Beat(batches=self.batches, totals=list(t)) for r, t in enumerate(self.totals)}


def reports(run, watch, windows=12, each=25):
    watch.update(run.go(0))
    found = [watch.update(run.go(each)) for _ in range(windows)]
    return [(i, f.rank, f.phase) for i, f in enumerate(found) if f is not None]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (((0.01, 0.05), (0.01, 0.05)), []),
        (((0.01, 0.05), (0.15, 0.05)), [(7, 1, "data")]),
        (((0.01, 0.05), (0.01, 0.05), (0.01, 0.2)), [(7, 2, "forward")]),
        (((0.15, 0.05), (0.01, 0.05)), [(7, 0, "data")]),
        # A little slower, and a thousand times a little.
        (((0.01, 0.05), (0.02, 0.05)), []),
        (((1e-6, 0.05), (1e-3, 0.05)), []),
    ],
)
def test_slow_rank_is_found_once_with_its_phase(ranks, expected):
    assert reports(Run(*ranks), StragglerWatch(1.5, 200)) == expected


def test_one_long_pause_makes_no_slow_rank():
    run, watch = Run((0.01, 0.05), (0.01, 0.05)), StragglerWatch(1.5, 200)
    watch.update(run.go(0))
    watch.update(run.go(50))
    run.totals[1][DATA] += 600
    run.totals[0][BACKWARD] += 600
    assert [watch.update(run.go(50)) for _ in range(9)] == [None] * 9


def test_sharded_weights_compare_the_data_only():
    """The ranks wait for each other in the forward pass, and a short one means nothing."""
    watch = StragglerWatch(1.5, 200, forward_waits=True)
    run = Run((0.01, 0.19), (0.15, 0.05))
    assert reports(run, watch) == [(7, 1, "data")]


def test_process_that_has_ended_is_known_to_the_others():
    me = ProcessIdentity.current()
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeps) as child:
        other = replace(me, pid=child.pid, started=_started(child.pid))
        assert not other.has_ended(me)
        assert replace(other, started="1").has_ended(me), "another process with its number"
        assert not replace(other, space="of a container").has_ended(me), "not known"
        other.kill(me)
        _until(lambda: other.has_ended(me))
        assert other.has_ended(me), "although nobody has waited for it yet"
        assert child.wait(10) == -signal.SIGKILL
    assert other.has_ended(me)
    other.kill(me)


def _started(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def _until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_process_that_looks_at_itself_has_not_ended():
    me = ProcessIdentity.current()
    assert me.pid == os.getpid()
    assert not me.has_ended(me)


def test_thread_outside_of_torch_is_in_no_collective():
    here = threading.get_ident()
    assert collective_of(here) == ""
    assert not is_compiling(here)
    assert collective_of(-1) == ""


def test_collective_is_named_by_the_function_that_waits():
    text = "def all_reduce(lock):\n    lock.acquire()\ndef wrapper(lock):\n    all_reduce(lock)\n"
    path = os.sep + os.path.join("torch", "distributed", "distributed_c10d.py")
    namespace, lock = {}, threading.Lock()
    exec(compile(text, path, "exec"), namespace)
    lock.acquire()
    thread = threading.Thread(target=namespace["wrapper"], args=(lock,))
    thread.start()
    try:
        _until(lambda: collective_of(thread.ident) == "all_reduce")
        assert collective_of(thread.ident) == "all_reduce"
    finally:
        lock.release()
        thread.join()


def test_compiler_is_noticed_while_it_compiles():
    seen, here = [], threading.get_ident()

    def backend(graph, inputs):
        seen.append(is_compiling(here))
        return graph.forward

    compiled = torch.compile(lambda x: x.sin(), backend=backend)
    assert torch.equal(compiled(torch.zeros(3)), torch.zeros(3))
    assert (seen, is_compiling(here)) == ([True], False)
