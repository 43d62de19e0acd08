"""Runs the corpus with protections and writes their figures.

    python -m benchmarks.corpus [--protection NAME ...] [--module PACKAGE.MODULE:CLASS ...]
        [--quick | --run ID ...] [--workers 1] [--again] [--folder FOLDER] [--out FOLDER]

Runs each entry of ``corpus_1.csv`` without protection and with each protection; without
``--protection`` and ``--module`` all that can run here. What was run before is read from
``--folder``; ``--again`` runs the protections again, for a new version of one. Writes
``corpus.json`` and ``corpus.md`` into ``--out``. `docs/corpus.md` explains the figures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.alternatives import ALL, find
from benchmarks.corpus.entries import CHECKSUM, VERSION, Entry, read, with_twins
from benchmarks.corpus.records import Record, Store, measure_all
from benchmarks.corpus.report import tables
from benchmarks.corpus.scores import Run, score
from benchmarks.corpus.sources import scenario_of
from benchmarks.rescue.judge import BARE, TOLERANCE, judge_all
from benchmarks.results import add_options, folder_of, save


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--protection", nargs="+", default=[], metavar="NAME", help=f"{list(ALL)}")
    parser.add_argument("--module", nargs="+", default=[], metavar="PACKAGE.MODULE:CLASS")
    parser.add_argument("--run", nargs="+", metavar="ID", help="only these runs and their twins")
    parser.add_argument("--workers", type=int, default=1, help="processes; 0: this process only")
    parser.add_argument("--again", action="store_true", help="ignore the records on file")
    parser.add_argument("--folder", type=Path, default=Path("runs/corpus"), help="of the records")
    args = parser.parse_args(arguments)
    for name in args.module:
        if ":" not in name:
            parser.error(f"argument --module: expected package.module:Class, got {name!r}")
    try:
        args.kinds = {name: find(name) for name in (*args.protection, *args.module)}
        ids = args.run or [entry.id for entry in read() if entry.quick or not args.quick]
        args.entries = with_twins(read(), ids)
    except ValueError as error:
        parser.error(str(error))
    return args


def compared(
    entries: Sequence[Entry], bare: Sequence[Record], records: Sequence[Record]
) -> list[Run]:
    """Puts the runs with a protection beside the unprotected ones.

    Args:
        entries: Runs of the corpus; each failing one is there with its twin.
        bare: Their records without protection.
        records: Their records with the protection.
    """
    scenarios = [scenario_of(entry.source, entry.name, entry.seed) for entry in entries]
    named = {scenario.name: scenario for scenario in scenarios}
    outcomes = [record.outcome for record in bare]
    of_bare = judge_all(named, outcomes, frozenset())
    others = [] if records is bare else [record.outcome for record in records]
    verdicts = judge_all(named, [*outcomes, *others], frozenset())[-len(entries) :]
    return [
        Run(entry=entry, record=record, bare=unprotected, verdict=verdict, bare_verdict=judged)
        for entry, record, unprotected, verdict, judged in zip(
            entries, records, bare, verdicts, of_bare, strict=True
        )
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and writes its files."""
    args = options(arguments)
    entries: list[Entry] = args.entries
    wanted, missing = _available(args)
    protections = list(dict.fromkeys((BARE, *wanted)))
    store = Store(args.folder)
    for name in wanted if args.again else ():
        for entry in entries:
            store.remove(entry, name)
    measure_all(entries, protections, args.workers, store)
    records = {name: _load(store, entries, name) for name in protections}
    runs = {
        find(name).name: compared(entries, records[BARE], found) for name, found in records.items()
    }
    scores = {name: score(group) for name, group in runs.items()}
    moved = [r.entry.id for r in runs[BARE] if not r.entry.healthy and r.bare.lost != r.entry.lost]
    if moved:
        print(f"lost at another step than in the corpus file: {', '.join(moved)}", file=sys.stderr)
    figures = {
        "corpus": VERSION,
        "checksum": CHECKSUM,
        "tolerance": TOLERANCE,
        "protections": {find(name).name: find(name).release() for name in protections},
        "missing": missing,
        "lost_at_another_step": moved,
        "cpu_seconds": {
            name: round(sum(run.record.outcome.cpu_seconds for run in group))
            for name, group in runs.items()
        },
        "scores": scores,
        "runs": {name: [_figures(run) for run in group] for name, group in runs.items()},
    }
    raises_alarms = {find(name).name for name in protections if find(name).raises_alarms}
    save("corpus", folder_of(args), figures, tables(runs, scores, raises_alarms))


def _available(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Returns the requested protections that can run, and the errors of the others."""
    kinds = args.kinds or ALL
    problems = {name: kind.problem() for name, kind in kinds.items()}
    missing = {name: problem for name, problem in problems.items() if problem is not None}
    for name, problem in missing.items():
        print(f"not run: {name}: {problem}", file=sys.stderr)
    return [name for name in kinds if name not in missing], missing


def _load(store: Store, entries: Sequence[Entry], name: str) -> list[Record]:
    records = [store.load(entry, name) for entry in entries]
    found = [record for record in records if record is not None]
    assert len(found) == len(entries), "measure_all leaves no run out"
    return found


def _figures(run: Run) -> dict[str, Any]:
    """Returns what the result file has of a run."""
    return {
        "id": run.entry.id,
        "lost": run.record.lost,
        "updates_changed": len(run.changed),
        "updates_clipped": len(run.clipped),
        "saved": run.verdict.saved,
        "noticed": run.noticed,
        "lead": run.lead,
        **{k: v for k, v in asdict(run.record.outcome).items() if k not in OMITTED},
        # The rest of a long message names temporary folders.
        "message": run.record.outcome.message[:80],
    }


OMITTED = ("scenario", "protection", "seconds", "cpu_seconds", "incidents")
"""Fields of an outcome that the result file leaves out."""

if __name__ == "__main__":
    # Exits in an orderly way, so that the worker processes end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
