"""Prints tables for the README and RESULTS.md from the files that the benchmarks wrote.

    python -m benchmarks.readme [--out FOLDER] [--quick]

Measures nothing. Each section names its file and the command and date of the measurement; for a
missing file it prints the command that writes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import Table, add_options, folder_of, load


def rescue(figures: dict[str, Any]) -> list[Table]:
    """Creates the summary tables of the rescue benchmark."""
    return [Table(**table) for table in figures["summary"]]


def cost(figures: dict[str, Any]) -> list[Table]:
    """Creates the tables of cost by batch size, by tensors and by suite."""
    tables = []
    for part in ("batches", "tensors", "suites"):
        rows = [
            [
                *(r["suite"], str(r["batch"]), str(r["tensors"]), f"{r['step_ms']:.0f}"),
                *(_spread(r["ratio"], "value"), f"{r['hooks_ms']:.1f}"),
            ]
            for r in figures.get(part, {}).get("rows", ())
        ]
        columns = ["suite", "batch", "tensors", "bare step, ms", "step", "in hooks, ms"]
        tables += [Table(f"cost, {part}", columns, rows)] if rows else []
    return [*tables, *_held(figures)]


def _held(figures: dict[str, Any]) -> list[Table]:
    rows = [
        [name, f"{suite['reads_per_step']:.1f}", f"{suite['tensor_bytes'] / 2**20:.0f}"]
        for name, suite in figures.get("held", {}).get("suites", {}).items()
    ]
    columns = ["suite", "reads by the host per step", "tensors held, MiB"]
    return [Table("held", columns, rows)] if rows else []


def location(figures: dict[str, Any]) -> list[Table]:
    """Creates the tables of tools that locate a NaN."""
    rows = [
        [
            *(finder, *("-" if n is None else str(n) for n in counts.values())),
            str(len(figures["all false alarms"][finder])),
        ]
        for finder, counts in figures["all"].items()
    ]
    columns = ["finder", "noticed", "module", "operation", "line", "false alarms"]
    total = f"of {len(figures['every step'])} bad steps"
    cost_rows = [[name, _spread(ratio)] for name, ratio in figures["cost"].items()]
    return [
        Table(f"origin of a NaN, {total}", columns, rows),
        Table("cost of the search", ["finder", "relative to a plain pass"], cost_rows),
    ]


def prediction(figures: dict[str, Any]) -> list[Table]:
    """Creates the table of divergence alarms."""
    rows = [
        [
            *(name, f"{w['recall']:.0%}", f"{w['recall_10_steps_ahead']:.0%}"),
            *(f"{w['false_per_1000_steps']:.2f}", f"{w['false_per_1000_calm_steps']:.2f}"),
        ]
        for name, w in figures["alarms"].items()
    ]
    columns = ["alarm", "announced", "10 steps ahead", "false per 1,000 steps", "of calm runs"]
    return [Table(f"prediction, {figures['diverged']} of {figures['runs']} diverge", columns, rows)]


def scale(figures: dict[str, Any]) -> list[Table]:
    """Creates the table of exponents and of the ends of the sweeps."""
    rows = []
    for key, fits in figures["fits"].items():
        first, last = figures[f"by {key}"][0], figures[f"by {key}"][-1]
        for part, fit in fits.items():
            ends = " to ".join(f"{point[part]:.2f}" for point in (first, last))
            rows.append([key, part, f"{first[key]:.0e} to {last[key]:.0e}", ends])
            rows[-1].append(f"{fit['floor']:.2f} + n^{fit['exponent']:.2f}")
    return [Table("scale", ["of", "hooks", "from, to", "ms per step", "fit"], rows)]


def soak(figures: dict[str, Any]) -> list[Table]:
    """Creates the table of the soak test."""
    record, resident = figures["record"], figures["resident_bytes"]
    rows = [
        ["steps", str(figures["steps"])],
        ["faults, and incidents recorded", f"{figures['faults']}, {record['incidents']}"],
        ["resident memory, first and last, MiB", f"{_mib(resident[0])}, {_mib(resident[-1])}"],
        ["growth, KiB per 1,000 steps", f"{figures['growth_per_1000_steps'] / 2**10:.1f}"],
    ]
    return [Table("soak", ["quantity", "value"], rows)]


def snapshot(figures: dict[str, Any]) -> list[Table]:
    """Creates the table of snapshots relative to a plain copy."""
    rows = [[name, _spread(figures[name])] for name in ("snapshot", "restore")]
    rows.append(["a snapshot's share of a step", f"{100 * figures['amortised_share']:.2f} %"])
    return [Table("snapshots", ["operation", "relative to a plain copy"], rows)]


PARTS: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "rescue": rescue,
    "overhead": cost,
    "overhead-suites": cost,
    "scale": scale,
    "snapshot": snapshot,
    "locate": location,
    "prediction": prediction,
    "soak": soak,
}
"""Tables by the name of the benchmark's file."""


def _spread(spread: dict[str, Any], middle: str = "median") -> str:
    return f"x{spread[middle]:.3f} ({spread['low']:.3f} to {spread['high']:.3f})"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f}"


def sections(folder: Path) -> list[str]:
    """Returns the section of each benchmark, or the command that runs it."""
    texts = []
    for name, part in PARTS.items():
        try:
            result = load(name, folder)
        except FileNotFoundError as error:
            texts.append(f"## {name}\n\n{error}")
            continue
        tables = "\n\n".join(f"{t.title}\n\n{t.markdown()}" for t in part(result["figures"]))
        machine = f"{result['machine']['processor']}, {result['machine']['cores']} cores"
        origin = f"`{result['command']}`, {result['date'][:10]}, {machine}, {name}.json"
        texts.append(f"## {name}\n\n{origin}\n\n{tables}")
    return texts


def main() -> None:
    """Prints all sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    print("\n\n".join(sections(folder_of(parser.parse_args()))))


if __name__ == "__main__":
    main()
