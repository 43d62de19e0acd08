"""What the suite saves, and what else would have.

    python -m benchmarks.rescue [--quick] [--seeds 0 1] [--jobs 2] [--out FOLDER]
        [--scenarios NAME ...] [--protections NAME ...]

Every scenario is run under every protection, each unchanged for all of them; a run counts as saved
if its held-out loss is within 5 % of that of its undisturbed twin with the same seed. Written are
``rescue.json``, ``rescue.md`` and ``rescue.png``. The protections from PyPI are there in
``.bench-venv``: ``make .bench-venv``, then ``.bench-venv/bin/python -m benchmarks.rescue``.
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
from benchmarks.rescue.table import QUICK, SCENARIOS, chosen
from benchmarks.rescue.workers import Job, run_all
from benchmarks.results import Table, add_options, folder_of, save

TELLS = frozenset(name for name, each in PROTECTIONS.items() if each.tells)
SAYS_CAUSES = frozenset({"this suite"})
SUMMARY = 3
"""Tables that sum up, before those of single runs."""


def jobs_for(
    scenarios: list[Scenario], protections: list[str], seeds: list[int], wanted: set[str]
) -> list[Job]:
    """Runs in an order in which what others are compared with comes first.

    A twin that nobody asked for is run unprotected only.
    """
    return [
        Job(scenario.name, protection, seed)
        for seed in seeds
        for protection in protections
        for scenario in scenarios
        if protection == BARE or scenario.name in wanted
    ]


def tables(
    scenarios: list[Scenario], outcomes: list[Outcome], unavailable: dict[str, str]
) -> list[Table]:
    """All tables of a set of outcomes."""
    verdicts = judge_all({s.name: s for s in scenarios}, outcomes, SAYS_CAUSES)
    found = [
        report.by_protection(verdicts, TELLS),
        report.by_family(verdicts),
        report.on_healthy(verdicts, TELLS),
    ]
    if unavailable:
        found.append(report.not_run(unavailable))
    return [*found, report.everything(verdicts)]


def in_order(outcomes: list[Outcome], jobs: list[Job]) -> list[Outcome]:
    """Outcomes in the order of their jobs, whichever came first."""
    places = {job: i for i, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda o: places[Job(o.scenario, o.protection, o.seed)])


def measure(jobs: list[Job], processes: int, timeout: float) -> list[Outcome]:
    """Run them all, with a line on the console for each; Ctrl-C keeps what has run."""
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
        print("interrupted: the tables are of what has run", file=sys.stderr)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one run")
    parser.add_argument("--scenarios", nargs="+", metavar="NAME", help="all by default")
    parser.add_argument("--protections", nargs="+", choices=list(PROTECTIONS))
    return parser.parse_args()


def main() -> None:
    """Run the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the processes end with this one
    args = options()
    names = args.scenarios or (list(QUICK) if args.quick else list(SCENARIOS))
    scenarios, unavailable = chosen(names), missing()
    asked = [p for p in args.protections or PROTECTIONS if p not in unavailable]
    protections = list(dict.fromkeys((BARE, *asked)))
    jobs = jobs_for(scenarios, protections, args.seeds, set(names))
    outcomes = measure(jobs, args.jobs, args.timeout)
    unavailable = {name: unavailable[name] for name in unavailable if name not in protections}
    folder: Path = folder_of(args)
    shown = tables(scenarios, outcomes, unavailable)
    figures = {
        "tolerance": 1.05,
        "summary": shown[:SUMMARY],
        "protections": {p: PROTECTIONS[p].release() for p in protections},
        "missing": unavailable,
        "beyond_remedy": {s.name: s.beyond_remedy for s in scenarios if s.beyond_remedy},
        "outcomes": [o.as_dict() for o in outcomes],
    }
    save("rescue", folder, figures, shown)
    _draw(scenarios, outcomes, folder / "rescue.png")


def _draw(scenarios: list[Scenario], outcomes: list[Outcome], path: Path) -> None:
    try:
        from benchmarks.rescue.picture import draw
    except ImportError as error:
        print(f"no picture: {error}; pip install -e '.[plots]'", file=sys.stderr)
        return
    draw(judge_all({s.name: s for s in scenarios}, outcomes, SAYS_CAUSES), path)


if __name__ == "__main__":
    main()
