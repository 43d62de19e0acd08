"""Runs entries of the corpus with protections, and keeps what has been run.

Each run is a file, so that an interrupted command goes on where it was. Imports Lightning.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.alternatives import find
from benchmarks.corpus.entries import VERSION, Entry, read, slug
from benchmarks.corpus.observer import Observer
from benchmarks.corpus.sources import scenario_of
from benchmarks.prediction.traces import onset
from benchmarks.rescue.run import Outcome, run
from benchmarks.rescue.workers import Job, limit_threads_and_output, run_all

TIMEOUT = 180.0
"""Seconds after which a run counts as hung."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run of the corpus with a protection; its fields have JSON types."""

    outcome: Outcome
    lost: int | None = None
    """First batch of the lasting rise of the loss, by `benchmarks.prediction.traces.onset`."""
    clipped: tuple[int, ...] = ()
    """See `Observer.clipped`."""
    changed: tuple[int, ...] = ()
    """See `Observer.changed`."""

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Record:
        """Creates a record from its JSON object."""
        lists = {name: tuple(row[name]) for name in ("clipped", "changed")}
        return cls(outcome=Outcome.from_dict(row["outcome"]), lost=row["lost"], **lists)


def measure(entry: Entry, protection: str) -> Record:
    """Runs an entry with a protection, named as for `benchmarks.alternatives.find`."""
    observer = Observer()
    scenario = scenario_of(entry.source, entry.name, entry.seed)
    outcome = run(scenario, protection, entry.seed, [observer])
    return Record(
        outcome=outcome,
        lost=onset(observer.losses),
        clipped=tuple(observer.clipped),
        changed=tuple(observer.changed),
    )


class Store:
    """Records on disk, one file each.

    Args:
        folder: Folder of all records. Those of another version of the corpus, torch or Python are
            kept apart, as their weights and losses are not comparable.
    """

    def __init__(self, folder: Path) -> None:
        versions = f"torch-{torch.__version__}-python-{platform.python_version()}"
        self.folder = folder / f"corpus-{VERSION}-{versions}"

    def load(self, entry: Entry, protection: str) -> Record | None:
        """Returns the record of a run, or None if it was not run."""
        path = self._path(entry, protection)
        if not path.exists():
            return None
        return Record.from_dict(json.loads(path.read_text(encoding="utf8")))

    def save(self, entry: Entry, protection: str, record: Record) -> None:
        """Saves the record of a run."""
        path = self._path(entry, protection)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(record)), encoding="utf8")
        unfinished.replace(path)

    def remove(self, entry: Entry, protection: str) -> None:
        """Removes the record of a run, if there is one."""
        self._path(entry, protection).unlink(missing_ok=True)

    def _path(self, entry: Entry, protection: str) -> Path:
        return self.folder / slug(protection) / f"{entry.id}.json"


def measure_all(
    entries: Sequence[Entry], protections: Sequence[str], workers: int, store: Store
) -> None:
    """Runs what is not in the store, in parallel, and prints a line for each run.

    Args:
        entries: Runs.
        protections: Names as for `benchmarks.alternatives.find`.
        workers: Number of processes; with 0 all runs in this process, without a time limit.
        store: Receives the records.
    """
    jobs = {
        Job(entry.id, protection, entry.seed): entry
        for protection in protections
        for entry in entries
        if store.load(entry, protection) is None
    }
    start = time.monotonic()
    results = _in_this_process(jobs) if workers == 0 else _in_processes(jobs, workers)
    for done, (job, record) in enumerate(results, 1):
        store.save(jobs[job], job.protection, record)
        outcome = record.outcome
        text = f"{time.monotonic() - start:6.0f} s {done}/{len(jobs)} {job.scenario}"
        ended = f"{outcome.ended} {outcome.message[:80]}"
        print(f"{text} | {outcome.protection}: {ended}", file=sys.stderr, flush=True)


def _in_this_process(jobs: dict[Job, Entry]) -> Iterator[tuple[Job, Record]]:
    limit_threads_and_output()
    for job, entry in jobs.items():
        yield job, measure(entry, job.protection)


def _in_processes(jobs: dict[Job, Entry], workers: int) -> Iterator[tuple[Job, Record]]:
    results: Iterator[Any] = run_all(list(jobs), workers, TIMEOUT, serve=serve)
    for result in results:
        if isinstance(result, Outcome):  # of a process that died or was stopped
            job = Job(result.scenario, result.protection, result.seed)
            entry, title = jobs[job], find(job.protection).name
            name = scenario_of(entry.source, entry.name, entry.seed).name
            yield job, Record(outcome=replace(result, scenario=name, protection=title))
        else:
            yield result


def serve(pipe: Connection) -> None:
    """Runs jobs from the pipe until it is closed."""
    limit_threads_and_output()
    entries = {entry.id: entry for entry in read()}
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send((job, measure(entries[job.scenario], job.protection)))
