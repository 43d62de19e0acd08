"""Many runs in a few processes, none of which can end the others.

A process serves run after run, since importing takes as long as some of them; one that dies or
takes too long is replaced. Imports the standard library at its top; a worker imports the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.rescue.run import Outcome


class Job(NamedTuple):
    """One run, by names."""

    scenario: str
    protection: str
    seed: int


class _Worker:
    """A process with one job at a time."""

    def __init__(self, serve: Callable[[Connection], None], starting: float) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.ends, self.extra = 0.0, starting

    def give(self, job: Job, timeout: float) -> None:
        self.pipe.send(job)
        self.job, self.ends = job, time.monotonic() + timeout + self.extra
        self.extra = 0.0

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_all(
    jobs: Sequence[Job],
    processes: int,
    timeout: float,
    *,
    starting: float = 120.0,
    serve: Callable[[Connection], None] | None = None,
) -> Iterator[Outcome]:
    """Outcomes as they come.

    Args:
        jobs: what to run, in this order.
        processes: how many at a time.
        timeout: seconds after which a run counts as hung.
        starting: seconds that a process may take for its imports, on top of its first run.
        serve: what a process does with its end of a pipe, from which it is given jobs.
    """
    waiting = deque(jobs)
    start = partial(_Worker, serve or serve_runs, starting)
    workers = [start() for _ in range(min(processes, len(jobs)))]
    try:
        while waiting or any(worker.job for worker in workers):
            for worker in list(workers):
                if worker.job is None and waiting:
                    worker.give(waiting.popleft(), timeout)
                outcome, alive = _collect(worker)
                if not alive:
                    worker.stop()
                    workers.remove(worker)
                    workers += [start()] if waiting else []
                if outcome is not None:
                    yield outcome
            wait([worker.pipe for worker in workers if worker.job], timeout=0.2)
    finally:
        for worker in workers:
            worker.stop()


def _collect(worker: _Worker) -> tuple[Outcome | None, bool]:
    """What has come of the worker's job, if anything, and whether the worker is still of use."""
    job = worker.job
    if job is None:
        return None, True
    if worker.pipe.poll():
        worker.job = None
        try:
            return worker.pipe.recv(), True
        except (EOFError, OSError):
            worker.process.join(5)
            message = f"its process ended with exit code {worker.process.exitcode}"
            return lost(job, "failed", message), False
    if time.monotonic() > worker.ends:
        return lost(job, "hung", "ended by the clock"), False
    return None, True


def lost(job: Job, ended: Any, message: str) -> Outcome:
    """The outcome of a run of which nothing came back."""
    from benchmarks.rescue.run import Outcome

    return Outcome(
        scenario=job.scenario,
        protection=job.protection,
        seed=job.seed,
        ended=ended,
        message=message,
    )


def serve_runs(pipe: Connection) -> None:
    """Run what comes, until nothing comes any more."""
    _quiet()
    from benchmarks.rescue.run import run
    from benchmarks.rescue.table import by_name

    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send(run(by_name(job.scenario), job.protection, job.seed))


def _quiet() -> None:
    """One thread, and nothing on the console but the table."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
