"""Measures how many faulty runs this suite rescues, compared with other protections.

    python -m benchmarks.rescue [--quick] [--seeds 0 1] [--jobs 2] [--out FOLDER]
        [--scenarios NAME ...] [--protections NAME ...]

Runs every scenario with every protection; a protection has the same settings in all scenarios. A
run counts as saved if its held-out loss is at most 5 % above that of its undisturbed twin with the
same seed. Writes ``rescue.json``, ``rescue.md`` and ``rescue.png``. The protections from PyPI are
installed in ``.bench-venv``: ``make .bench-venv``, then ``.bench-venv/bin/python -m
benchmarks.rescue``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.alternatives import PROTECTIONS, missing
from benchmarks.rescue import report
from benchmarks.rescue.judge import BARE, judge_all
from benchmarks.rescue.run import Outcome
from benchmarks.rescue.scenario import Scenario
from benchmarks.rescue.table import QUICK, SCENARIOS, with_twins
from benchmarks.rescue.workers import Job, run_all
from benchmarks.results import Table, add_options, folder_of, save

RAISES_ALARMS = frozenset(name for name, kind in PROTECTIONS.items() if kind.raises_alarms)
NAMES_CAUSES = frozenset({"this suite"})
SUMMARY = 3
"""Number of summary tables, which come before the table of single runs."""


def jobs_for(
    scenarios: list[Scenario], protections: list[str], seeds: list[int], requested: set[str]
) -> list[Job]:
    """Returns the runs; for each seed the unprotected reference runs come first.

    Twins that were not requested run without protection only.
    """
    return [
        Job(scenario.name, protection, seed)
        for seed in seeds
        for protection in protections
        for scenario in scenarios
        if protection == BARE or scenario.name in requested
    ]


def tables(
    scenarios: list[Scenario], outcomes: list[Outcome], unavailable: dict[str, str]
) -> list[Table]:
    """Returns all tables of a set of outcomes."""
    verdicts = judge_all({s.name: s for s in scenarios}, outcomes, NAMES_CAUSES)
    summary = [
        report.by_protection(verdicts, RAISES_ALARMS),
        report.by_family(verdicts),
        report.on_healthy(verdicts, RAISES_ALARMS),
    ]
    if unavailable:
        summary.append(report.not_run(unavailable))
    return [*summary, report.everything(verdicts)]


def in_order(outcomes: list[Outcome], jobs: list[Job]) -> list[Outcome]:
    """Sorts outcomes in the order of their jobs."""
    positions = {job: i for i, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda o: positions[Job(o.scenario, o.protection, o.seed)])


def measure(jobs: list[Job], processes: int, timeout: float) -> list[Outcome]:
    """Runs all jobs and prints a line for each; after Ctrl-C returns the finished ones."""
    outcomes: list[Outcome] = []
    start = time.monotonic()
    for outcome in _until_interrupted(run_all(jobs, processes, timeout)):
        outcomes.append(outcome)
        done = f"{time.monotonic() - start:6.0f} s {len(outcomes)}/{len(jobs)}"
        run = f"{outcome.scenario} | {outcome.protection} | seed {outcome.seed}"
        ended = f"{outcome.ended} {outcome.message[:100]}"
        print(f"{done} {run}: {ended}", file=sys.stderr, flush=True)
    return in_order(outcomes, jobs)


def _until_interrupted(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    try:
        yield from outcomes
    except KeyboardInterrupt:
        print("interrupted: the tables contain the finished runs only", file=sys.stderr)


def options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--timeout", type=float, default=120.0, help="time limit of a run, seconds")
    parser.add_argument("--scenarios", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--protections", nargs="+", choices=list(PROTECTIONS))
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark and writes its files."""
    # Exits in an orderly way, so that the worker processes end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = options()
    names = args.scenarios or (list(QUICK) if args.quick else list(SCENARIOS))
    scenarios, unavailable = with_twins(names), missing()
    requested = [p for p in args.protections or PROTECTIONS if p not in unavailable]
    protections = list(dict.fromkeys((BARE, *requested)))
    jobs = jobs_for(scenarios, protections, args.seeds, set(names))
    outcomes = measure(jobs, args.jobs, args.timeout)
    unavailable = {name: unavailable[name] for name in unavailable if name not in protections}
    folder: Path = folder_of(args)
    all_tables = tables(scenarios, outcomes, unavailable)
    figures = {
        "tolerance": 1.05,
        "summary": all_tables[:SUMMARY],
        "protections": {p: PROTECTIONS[p].release() for p in protections},
        "missing": unavailable,
        "beyond_remedy": {s.name: s.beyond_remedy for s in scenarios if s.beyond_remedy},
        "outcomes": [o.as_dict() for o in outcomes],
    }
    save("rescue", folder, figures, all_tables)
    _draw(scenarios, outcomes, folder / "rescue.png")


def _draw(scenarios: list[Scenario], outcomes: list[Outcome], path: Path) -> None:
    try:
        from benchmarks.rescue.picture import draw
    except ImportError as error:
        print(f"no picture: {error}; pip install -e '.[plots]'", file=sys.stderr)
        return
    draw(judge_all({s.name: s for s in scenarios}, outcomes, NAMES_CAUSES), path)


if __name__ == "__main__":
    main()
