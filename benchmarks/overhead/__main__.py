"""Measures the cost of the suite per optimizer step, relative to a step without the suite.

    python -m benchmarks.overhead [--parts batches tensors tiny held] [--steps 120] [--quick]
    python -m benchmarks.overhead --parts suites
    python -m benchmarks.overhead --suites "default suite" [--batch 8] [--precision bf16-mixed]

One process, one torch thread, a byte-level Transformer with 9.9 M parameters. A bare Trainer and
Trainers with a suite alternate step by step on equal models and batches, so that all have the same
machine noise. Reports the ratio of a step to the corresponding bare step with a 95 % interval
(`benchmarks.overhead.turns` describes how the snapshot in every 20 steps counts), the difference
in milliseconds, and the mean time in hooks by a clock around each hook, including work that is done
once in 50 steps.

``batches``: three batch sizes, together with a second bare Trainer, which shows the effect of the
location in memory alone; at one size also with only the suite's reads and copies of whole tensors,
and with Trainers that clip to a norm. ``tensors``: as many parameters in 102 and in 1002 tensors.
``tiny``: a net whose step is little more than Lightning's own work. ``held``: reads of tensors by
the host and bytes of memory, minus those of a fit without the suite. ``suites``, not run by
default: each callback and option, and other protections, at batch size 1, where a fixed cost is
most visible. A protection that wraps the optimizer's step has no hook, so only the whole step
measures it. A fit with an incident is excluded, because it is not healthy.
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
from benchmarks.overhead.held import footprint_of
from benchmarks.overhead.suites import BASELINES, OURS, SUITES, TENSORBOARD, alternatives
from benchmarks.overhead.turns import BLOCK, WARMUP_BLOCKS, Setting, in_blocks, ratio, take_turns
from benchmarks.results import Estimate, Table, add_options, folder_of, save

MODEL = ByteGPTConfig(width=400, layers=5)
SMALL = ByteGPTConfig(width=128, layers=4)
BATCHES = {2: 200, 8: 180, 16: 120}
"""Number of steps by batch size, in sequences of 64 bytes."""
IN_TENSORS = (ByteGPTConfig(width=320, layers=8), ByteGPTConfig(width=100, layers=83))
AT_ONCE = 4
"""Suites that alternate with one bare Trainer; each holds a model and its optimizer."""
SUITE, TRAFFIC, CONTROL = "default suite", "its reads and copies alone", "bare, again"
CLIPS = "default suite, clips"
TINY = ByteGPTConfig(width=16, layers=1)
PARTS_BY_DEFAULT = ("batches", "tensors", "tiny", "held")


@dataclass(frozen=True)
class Row:
    """Result of one suite in one setting."""

    suite: str
    ratio: Estimate
    """Ratio of a step to the baseline's step."""
    step_ms: float
    """Median step of the baseline."""
    hooks_ms: float
    """Mean time per step in the suite's hooks, minus the baseline's."""
    batch: int
    parameters: int
    tensors: int


def compare(
    names: Iterable[str], setting: Setting, suites: Mapping[str, Any] = SUITES
) -> tuple[list[Row], list[str]]:
    """Measures each suite against its baseline; returns the rows and the failures."""
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
                failed.append(f"{name} is not a healthy run: {times[name].incidents} incident(s)")
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
    """Measures the default suite at three batch sizes."""
    sizes = dict.fromkeys((1, 2, 4), (WARMUP_BLOCKS + 1) * BLOCK) if quick else BATCHES
    names = {size: [SUITE, CONTROL] for size in sizes}
    names[setting.batch] = [SUITE, TRAFFIC, CONTROL, CLIPS]
    results = [compare(names[b], replace(setting, batch=b, steps=s)) for b, s in sizes.items()]
    return [r for rows, _ in results for r in rows], [f for _, failed in results for f in failed]


def suites(setting: Setting, quick: bool) -> tuple[list[Row], list[str]]:
    """Measures each callback, option and protection at batch size 1."""
    others, missing = alternatives()
    ours = [n for n in {**OURS, **TENSORBOARD} if n not in BASELINES]
    rows, failed = compare([*ours, *others], replace(setting, batch=1), {**SUITES, **others})
    return rows, failed + [f"{name}: {error}" for name, error in missing.items()]


def tensors(setting: Setting, quick: bool) -> tuple[list[Row], list[str]]:
    """Measures the default suite on as many parameters in more tensors."""
    shapes = [ByteGPTConfig(width=64, layers=n) for n in (2, 8)] if quick else IN_TENSORS
    # With 83 layers and a learning rate of 1e-3, step 59 has gradients 74 times as large as usual.
    low_lr = replace(setting, batch=2, lr=1e-4)
    results = [compare([SUITE], replace(low_lr, config=shape)) for shape in shapes]
    return [r for rows, _ in results for r in rows], [f for _, failed in results for f in failed]


def tiny(setting: Setting, quick: bool) -> tuple[list[Row], list[str]]:
    """Measures the default suite on a net whose step is little more than Lightning's own work."""
    steps = setting.steps if quick else (WARMUP_BLOCKS + 20) * BLOCK
    return compare([SUITE, CONTROL], replace(setting, batch=2, config=TINY, steps=steps))


PARTS: dict[str, Callable[[Setting, bool], tuple[list[Row], list[str]]]] = {
    "batches": batches,
    "suites": suites,
    "tensors": tensors,
    "tiny": tiny,
}


def held(setting: Setting) -> dict[str, Any]:
    """Measures reads and bytes of the default suite and of its monitor alone."""
    setting = replace(setting, batch=2, steps=45)
    bare = footprint_of(SUITES["bare"], setting)
    footprints = {}
    for name in ("GradientMonitor", SUITE):
        suite = footprint_of(SUITES[name], setting)
        footprints[name] = {
            "reads_per_step": suite.reads - bare.reads,
            "tensor_bytes": suite.tensors - bare.tensors,
            "python_bytes": suite.python - bare.python,
        }
    weights = sum(p.numel() * 4 for p in ByteGPT(setting.config).parameters())
    return {"steps": setting.steps, "weight_bytes": weights, "suites": footprints}


def table_of(title: str, rows: Iterable[Row]) -> Table:
    """Formats the rows as a table."""
    columns = ["suite", "batch", "parameters", "tensors", "bare step, ms", "step (95 %)"]
    return Table(title, [*columns, "difference, ms", "in hooks, ms"], [_cells(r) for r in rows])


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


def held_table(figures: dict[str, Any]) -> Table:
    """Formats reads and bytes as a table."""
    columns = ["suite", "reads by the host per step", "tensors, MiB", "other objects, MiB"]
    rows = [
        [name, f"{suite['reads_per_step']:.2f}"]
        + [f"{suite[key] / 2**20:.1f}" for key in ("tensor_bytes", "python_bytes")]
        for name, suite in figures["suites"].items()
    ]
    weights = figures["weight_bytes"] / 2**20
    return Table(f"in addition to the bare fit, {weights:.1f} MiB of weights", columns, rows)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, "held"], default=PARTS_BY_DEFAULT)
    parser.add_argument("--suites", nargs="*", choices=[*SUITES], help="measure only these suites")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps = args.steps or (WARMUP_BLOCKS + (1 if args.quick else 3)) * BLOCK
    setting = Setting(SMALL if args.quick else MODEL, args.batch, steps, args.precision)
    figures: dict[str, Any] = {}
    tables = []
    if args.suites:
        parts = {"chosen": lambda s, quick: compare(args.suites, s)}
    else:
        parts = {name: PARTS[name] for name in args.parts if name in PARTS}
    for name, part in parts.items():
        rows, failed = part(setting, args.quick)
        figures[name] = {"rows": rows, "not measured": failed}
        tables.append(table_of(name, rows))
    if "held" in args.parts and not args.suites:
        figures["held"] = held(setting)
        tables.append(held_table(figures["held"]))
    chosen = ["chosen"] if args.suites else args.parts
    name = "overhead" if (*chosen,) == PARTS_BY_DEFAULT else "-".join(["overhead", *chosen])
    save(name, folder_of(args), figures, tables)


if __name__ == "__main__":
    main()
