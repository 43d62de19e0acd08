"""Runs many jobs in a few processes; a crash or hang of one does not affect the others.

A process runs one job after another, because imports take as long as some jobs; a process that
dies or exceeds the time limit is replaced. The module imports only the standard library; a worker
imports the rest.
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
    """A run, identified by names and seed."""

    scenario: str
    protection: str
    seed: int


class _Worker:
    """A process that runs one job at a time."""

    def __init__(self, serve: Callable[[Connection], None], startup_timeout: float) -> None:
        context = get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=serve, args=(child_end,), daemon=True)
        self.process.start()
        child_end.close()
        self.job: Job | None = None
        self.deadline, self.startup_timeout = 0.0, startup_timeout

    def assign(self, job: Job, timeout: float) -> None:
        self.pipe.send(job)
        self.job, self.deadline = job, time.monotonic() + timeout + self.startup_timeout
        self.startup_timeout = 0.0

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_all(
    jobs: Sequence[Job],
    processes: int,
    timeout: float,
    *,
    startup_timeout: float = 120.0,
    serve: Callable[[Connection], None] | None = None,
) -> Iterator[Outcome]:
    """Runs all jobs and yields their outcomes as they finish.

    Args:
        jobs: Jobs, started in this order.
        processes: Number of processes.
        timeout: Seconds after which a run counts as hung.
        startup_timeout: Additional seconds for the imports before a process's first run.
        serve: Function of a process; it receives jobs from a pipe and sends outcomes back.
    """
    waiting = deque(jobs)
    start = partial(_Worker, serve or serve_runs, startup_timeout)
    workers = [start() for _ in range(min(processes, len(jobs)))]
    try:
        while waiting or any(worker.job for worker in workers):
            for worker in list(workers):
                if worker.job is None and waiting:
                    worker.assign(waiting.popleft(), timeout)
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
    """Returns the outcome of the worker's job, if it has ended, and whether the worker is alive."""
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
            return outcome_without_result(job, "failed", message), False
    if time.monotonic() > worker.deadline:
        return outcome_without_result(job, "hung", "stopped at the time limit"), False
    return None, True


def outcome_without_result(job: Job, ended: Any, message: str) -> Outcome:
    """Creates the outcome of a run whose process returned nothing."""
    from benchmarks.rescue.run import Outcome

    return Outcome(
        scenario=job.scenario,
        protection=job.protection,
        seed=job.seed,
        ended=ended,
        message=message,
    )


def serve_runs(pipe: Connection) -> None:
    """Runs jobs from the pipe until it is closed."""
    limit_threads_and_output()
    from benchmarks.rescue.run import run
    from benchmarks.rescue.table import by_name

    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send(run(by_name(job.scenario), job.protection, job.seed))


def limit_threads_and_output() -> None:
    """Sets torch to one thread and silences warnings and logs."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
