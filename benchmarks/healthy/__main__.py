"""Measures what the suite does to healthy runs of many kinds.

    python -m benchmarks.healthy [--only NAME ...] [--seed 0] [--quick] [--out FOLDER]

Trains each kind bare and with ``stability_callbacks()``, with the same seed, and compares what the
runs end with. ``--only`` selects the kinds whose names contain one of the texts, and writes files
only into ``--out``. One thread.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

import torch

from benchmarks.healthy.judge import Comparison, NotHealthyError, compare
from benchmarks.healthy.kind import Kind
from benchmarks.healthy.report import everything, line, summary
from benchmarks.healthy.table import KINDS, QUICK, select
from benchmarks.results import add_options, folder_of, save


def options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="default: all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="list the kinds and train nothing")
    return parser.parse_args()


def measure(kinds: list[Kind], seed: int) -> tuple[list[Comparison], list[str]]:
    """Compares each kind and prints a line; returns the comparisons, and what is not healthy."""
    results = [_compare(kind, seed) for kind in kinds]
    comparisons = [result for result in results if isinstance(result, Comparison)]
    return comparisons, [result for result in results if isinstance(result, str)]


def _compare(kind: Kind, seed: int) -> Comparison | str:
    try:
        comparison = compare(kind, seed)
    except NotHealthyError as error:
        print(f"NOT HEALTHY                {error}", flush=True)
        return str(error)
    print(line(comparison), flush=True)
    return comparison


def main() -> None:
    """Runs the benchmark and writes its files."""
    args = options()
    kinds = select(args.only) if args.only else [KINDS[n] for n in (QUICK if args.quick else KINDS)]
    if args.list:
        print("\n".join(f"{kind.name}: {kind.practice}" for kind in kinds))
        return
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    comparisons, faults = measure(kinds, args.seed)
    figures = {"kinds": [c.as_dict() for c in comparisons], "not_healthy": faults}
    tables = [summary(comparisons), everything(comparisons)]
    if args.only and args.out is None:
        print("\n\n".join(table.markdown() for table in tables))
    else:
        save("healthy", folder_of(args), figures, tables)
    if faults:
        sys.exit(f"{len(faults)} kinds are not healthy without the suite")


if __name__ == "__main__":
    main()
