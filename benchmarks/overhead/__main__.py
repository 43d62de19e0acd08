"""What the suite costs per optimizer step, against the bare step of the same run.

    python -m benchmarks.overhead [--parts batches tensors held] [--steps 120] [--quick]
    python -m benchmarks.overhead --parts suites
    python -m benchmarks.overhead --suites "default suite" [--batch 8] [--precision bf16-mixed]

One process, one torch thread, a byte-level Transformer of 9.9 M parameters. A bare and protected
Trainers take turns, step by step, on equal models and batches, so that all meet the same noise of
the machine. Reported is the ratio of a step to the bare step beside it (`benchmarks.overhead.turns`
says how a snapshot in every 20 steps counts), with an interval of 95 %, what that is in
milliseconds, and the mean time inside the hooks by a clock around each, what comes once in 50 steps
included. ``batches``: at three batch sizes, beside a second bare Trainer, which shows what the
place in memory alone makes, and at one of them beside the suite's reads and copies of whole
tensors, without all the rest. ``tensors``: as many parameters in 102 and in 1002 tensors. ``held``:
reads of tensors by the host, and bytes, those of a fit without the suite subtracted. ``suites``,
not among the defaults: each callback and option, and other protections, at a batch of 1, where a
fixed cost shows best. What wraps an optimizer's step is no hook: of that only the whole step
speaks. A fit with an incident is not counted, as it is not a healthy one.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.byte_gpt import ByteGPT, ByteGPTConfig
from benchmarks.overhead.held import held_by
from benchmarks.overhead.suites import BASELINES, OURS, SUITES, TENSORBOARD, alternatives
from benchmarks.overhead.turns import BLOCK, WARM, Setting, in_blocks, ratio, take_turns
from benchmarks.results import Estimate, Table, add_options, folder_of, save

MODEL = ByteGPTConfig(width=400, layers=5)
SMALL = ByteGPTConfig(width=128, layers=4)
BATCHES = {2: 200, 8: 180, 16: 120}
"""Sequences of 64 bytes in a batch -> steps."""
IN_TENSORS = (ByteGPTConfig(width=320, layers=8), ByteGPTConfig(width=100, layers=83))
AT_ONCE = 4
"""Suites that take turns with one bare Trainer: each holds a model and its optimizer."""
SUITE, TRAFFIC, CONTROL = "default suite", "its reads and copies alone", "bare, again"
PARTS_BY_DEFAULT = ("batches", "tensors", "held")


@dataclass(frozen=True)
class Row:
    """One suite in one setting."""

    suite: str
    ratio: Estimate
    """Of the step to the baseline's."""
    step_ms: float
    """Of the baseline."""
    hooks_ms: float
    """Mean time a step in the suite's hooks, without what the baseline needs for the same."""
    batch: int
    parameters: int
    tensors: int


def compare(
    names: Iterable[str], setting: Setting, suites: Mapping[str, Any] = SUITES
) -> tuple[list[Row], list[str]]:
    """A row for each suite but the baselines, and which of them did not get through."""
    rows, failed = [], []
    names = [*names]
    for start in range(0, len(names), AT_ONCE):
        group = names[start : start + AT_ONCE]
        baselines = dict.fromkeys(suites[name].baseline for name in group)
        times = take_turns([*baselines, *group], setting, suites)
        for name in group:
            base = times[suites[name].baseline]
            if len(times[name].steps) < setting.steps:
                failed.append(f"{name} took {len(times[name].steps)} of {setting.steps} steps")
                continue
            if times[name].incidents:
                failed.append(f"{name} is no healthy run: {times[name].incidents} incident(s)")
                continue
            rows.append(_row(name, times[name], base, setting))
    return rows, failed


def _row(name: str, times: Any, base: Any, setting: Setting) -> Row:
    hooks_ms = 1e3 * float(in_blocks(times.hooks).mean() - in_blocks(base.hooks).mean())
    parameters = [p.numel() for p in ByteGPT(setting.config).parameters()]
    return Row(
        name,
        ratio(times.steps, base.steps),
        1e3 * float(np.median(in_blocks(base.steps))),
        hooks_ms,
        setting.batch,
        sum(parameters),
        len(parameters),
    )


def batches(setting: Setting, quick: bool) -> tuple[list[Row], list[str]]:
    """The default suite at three batch sizes."""
    sizes = dict.fromkeys((1, 2, 4), (WARM + 1) * BLOCK) if quick else BATCHES
    named = {size: [SUITE, CONTROL] for size in sizes}
    named[setting.batch] = [SUITE, TRAFFIC, CONTROL]
    found = [compare(named[b], replace(setting, batch=b, steps=s)) for b, s in sizes.items()]
    return [r for rows, _ in found for r in rows], [f for _, failed in found for f in failed]


def suites(setting: Setting, quick: bool) -> tuple[list[Row], list[str]]:
    """Each callback, option and protection at a small batch."""
    foreign, missing = alternatives()
    chosen = [n for n in {**OURS, **TENSORBOARD} if n not in BASELINES]
    known = {**SUITES, **foreign}
    rows, failed = compare([*chosen, *foreign], replace(setting, batch=1), known)
    return rows, failed + [f"{name}: {why}" for name, why in missing.items()]


def tensors(setting: Setting, quick: bool) -> tuple[list[Row], list[str]]:
    """The default suite on as many parameters in more tensors."""
    shapes = [ByteGPTConfig(width=64, layers=n) for n in (2, 8)] if quick else IN_TENSORS
    # In 83 layers a learning rate of 1e-3 makes gradients of 74 times the usual, at step 59.
    calm = replace(setting, batch=2, lr=1e-4)
    found = [compare([SUITE], replace(calm, config=shape)) for shape in shapes]
    return [r for rows, _ in found for r in rows], [f for _, failed in found for f in failed]


PARTS: dict[str, Callable[[Setting, bool], tuple[list[Row], list[str]]]] = {
    "batches": batches,
    "suites": suites,
    "tensors": tensors,
}


def held(setting: Setting) -> dict[str, Any]:
    """Reads and bytes of the default suite and of its monitor alone."""
    setting = replace(setting, batch=2, steps=45)
    bare = held_by(SUITES["bare"], setting)
    found = {}
    for name in ("GradientMonitor", SUITE):
        suite = held_by(SUITES[name], setting)
        found[name] = {
            "reads_per_step": suite.reads - bare.reads,
            "tensor_bytes": suite.tensors - bare.tensors,
            "python_bytes": suite.python - bare.python,
        }
    weights = sum(p.numel() * 4 for p in ByteGPT(setting.config).parameters())
    return {"steps": setting.steps, "weight_bytes": weights, "suites": found}


def table_of(title: str, rows: Iterable[Row]) -> Table:
    """The rows as they are to be read."""
    columns = ["suite", "batch", "parameters", "tensors", "bare step, ms", "step (95 %)"]
    return Table(title, [*columns, "more, ms", "in hooks, ms"], [_cells(r) for r in rows])


def _cells(row: Row) -> list[str]:
    return [
        row.suite,
        str(row.batch),
        f"{row.parameters / 1e6:.1f} M",
        str(row.tensors),
        f"{row.step_ms:.1f}",
        f"x{row.ratio:.3f}",
        f"{row.step_ms * (row.ratio.value - 1):.2f}",
        f"{row.hooks_ms:.2f}",
    ]


def held_table(found: dict[str, Any]) -> Table:
    """Reads and bytes as they are to be read."""
    columns = ["suite", "reads by the host per step", "tensors, MiB", "other objects, MiB"]
    rows = [
        [name, f"{each['reads_per_step']:.2f}"]
        + [f"{each[key] / 2**20:.1f}" for key in ("tensor_bytes", "python_bytes")]
        for name, each in found["suites"].items()
    ]
    weights = found["weight_bytes"] / 2**20
    return Table(f"held beyond the bare fit, with {weights:.1f} MiB of weights", columns, rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, "held"], default=PARTS_BY_DEFAULT)
    parser.add_argument("--suites", nargs="*", choices=[*SUITES], help="only these, in one part")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps = args.steps or (WARM + (1 if args.quick else 3)) * BLOCK
    setting = Setting(SMALL if args.quick else MODEL, args.batch, steps, args.precision)
    figures: dict[str, Any] = {}
    shown = []
    if args.suites:
        parts = {"chosen": lambda s, quick: compare(args.suites, s)}
    else:
        parts = {name: PARTS[name] for name in args.parts if name in PARTS}
    for name, part in parts.items():
        rows, failed = part(setting, args.quick)
        figures[name] = {"rows": rows, "not measured": failed}
        shown.append(table_of(name, rows))
    if "held" in args.parts and not args.suites:
        figures["held"] = held(setting)
        shown.append(held_table(figures["held"]))
    chosen = ["chosen"] if args.suites else args.parts
    name = "overhead" if (*chosen,) == PARTS_BY_DEFAULT else "-".join(["overhead", *chosen])
    save(name, folder_of(args), figures, shown)


if __name__ == "__main__":
    main()
