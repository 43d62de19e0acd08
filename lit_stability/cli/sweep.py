"""Several runs of one config: every combination of the values of `KEY=VALUE,VALUE`.

Imports neither torch nor Lightning: each run has a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_stability.checks.text_table import align, format_number
from lit_stability.cli.config import compose, resolve
from lit_stability.cli.experiments.outcome import Outcome
from lit_stability.cli.experiments.process import fit_in_process, last_line
from lit_stability.cli.run_folders import choose_run_dir, delete_run, is_run
from lit_stability.errors import ConfigError
from lit_stability.printing import printable
from lit_stability.training_state.atomic_write import write_and_keep

TABLE = "sweep.json"
"""Name of the file in the folder of a sweep that has all values of its table."""
_METRICS = 5
"""Metrics in the printed table; the file has all."""
_PAIRS = {"[": "]", "{": "}", "(": ")"}


def values_of(override: str) -> list[str]:
    """Returns one override for each value; commas in brackets or quotes are part of a value.

    >>> values_of("model.lr=1e-3,1e-2")
    ['model.lr=1e-3', 'model.lr=1e-2']
    >>> values_of("model.sizes=[8,16]"), values_of("about='small, quick'")
    (['model.sizes=[8,16]'], ["about='small, quick'"])
    """
    key, equals, value = override.partition("=")
    values, closing = [""], list[str]()
    for character in value:
        if closing and character == closing[-1]:
            closing.pop()
        elif character in _PAIRS and not (closing and closing[-1] in "\"'"):
            closing.append(_PAIRS[character])
        elif character in "\"'" and not closing and not values[-1]:
            closing.append(character)
        elif character == "," and not closing:
            values.append("")
            continue
        values[-1] += character
    if closing:
        values = [value]
    return [f"{key}{equals}{each}" for each in values]


def combinations(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the overrides of each run, the last key varying fastest.

    >>> combinations(["a=1,2", "b=3"])
    [('a=1', 'b=3'), ('a=2', 'b=3')]
    """
    return list(itertools.product(*map(values_of, overrides)))


def is_sweep(overrides: Sequence[str]) -> bool:
    """Returns whether any override has more than one value."""
    return any(len(values_of(each)) > 1 for each in overrides)


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """A run of a sweep that has ended."""

    values: Mapping[str, str]
    """The values of the keys that have more than one."""
    ends: str
    code: int
    """Exit code of the process."""
    incidents: int
    metrics: Mapping[str, float]
    seconds: float
    folder: str


def run_sweep(args: argparse.Namespace) -> int:
    """Runs a config with each combination of values, prints a table and writes it.

    The runs are in folders of their own inside the folder that a single run would have.

    Args:
        args: Of the command `fit`, with at least one key that has several values.

    Returns:
        0 if every run returned 0; 130 if it was interrupted; else 1.

    Raises:
        ConfigError: An option does not go with several runs, or a config cannot be composed;
            nothing was started.
    """
    _check(args)
    runs = list(dict.fromkeys(combinations(args.overrides)))
    configs = [compose(args.config, each) for each in runs]
    choose_run_dir(configs[0], name=args.name, resume=None, overwrite=args.overwrite)
    folder = Path(str(resolve(configs[0])["run_dir"]))
    swept = [key for key in map(_key, args.overrides) if len({_value(r, key) for r in runs}) > 1]
    folders = {run: folder / _name({key: _value(run, key) for key in swept}) for run in runs}
    if len({*folders.values()}) < len(runs):  # the values differ in what no name can show
        folders = {run: folder / str(number) for number, run in enumerate(runs, 1)}
    for each in folders.values():
        if is_run(each) and not args.overwrite:
            raise ConfigError(
                f"{each}: has an earlier run; add --overwrite to replace it, or --name for another "
                "folder"
            )
    done: list[SweptRun] = []
    interrupted = False
    try:
        for run in runs:
            values = {key: _value(run, key) for key in swept}
            print(", ".join(f"{key}={value}" for key, value in values.items()), flush=True)
            done.append(_fit(args, run, values, folders[run]))
            print(f"  {done[-1].ends} ({done[-1].seconds:.0f} s)", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted after {len(done)} of {len(runs)} runs")
    if done:
        _report(done, swept, folder)
    return 130 if interrupted else int(any(each.code for each in done))


def _check(args: argparse.Namespace) -> None:
    for option, given in (
        ("--resume", args.resume),
        ("--print-config", args.print_config),
    ):
        if given:
            raise ConfigError(f"{option}: goes with one run; give each key one value")
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ConfigError(
            "several values: a sweep starts its runs one after another, which several processes "
            "cannot; run each value with its own torchrun or srun"
        )
    if any(_key(each) == "run_dir" and len(values_of(each)) > 1 for each in args.overrides):
        raise ConfigError("run_dir: give one folder; each run gets a folder of its own inside it")
    keys = [_key(each) for each in args.overrides]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: is given twice; write all its values in one {twice}=A,B")


def _fit(
    args: argparse.Namespace, run: Sequence[str], values: Mapping[str, str], folder: Path
) -> SweptRun:
    if args.overwrite:
        delete_run(folder)
    options = ["--strict"] if args.strict else []
    options += [word for pattern in args.allow for word in ("--allow", pattern)]
    files = [word for file in args.config for word in ("-c", str(file))]
    process = fit_in_process([*files, *options, *run], folder)
    try:
        outcome = Outcome.read(folder)
    except ValueError:
        outcome = None
    return SweptRun(
        values=values,
        ends=last_line(folder, process.code) if outcome is None else outcome.ending.ends,
        code=process.code,
        incidents=0 if outcome is None else len(outcome.incidents),
        metrics={} if outcome is None else dict(outcome.metrics),
        seconds=process.seconds,
        folder=str(folder),
    )


def _report(runs: Sequence[SweptRun], keys: Sequence[str], folder: Path) -> None:
    """Prints the table and writes all values; an existing file is renamed."""
    print(f"\n{as_text(runs, keys)}")
    rows = [
        {**vars(run), "metrics": {k: v if math.isfinite(v) else None for k, v in _sorted(run)}}
        for run in runs
    ]
    content: dict[str, Any] = {"version": 1, "runs": rows}
    write_and_keep(folder / TABLE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {folder / TABLE}")


def as_text(runs: Sequence[SweptRun], keys: Sequence[str]) -> str:
    """Returns the table of a sweep: a row for each run.

    Args:
        runs: In the order in which they ran.
        keys: That have more than one value.
    """
    names = sorted({name for run in runs for name in run.metrics})
    shown = names[:_METRICS]
    rows = [(*keys, "ended", "incidents", *shown, "time")]
    for run in runs:
        metrics = [format_number(run.metrics[n]) if n in run.metrics else "" for n in shown]
        cells = [*(run.values[key] for key in keys), run.ends[:40], str(run.incidents)]
        rows.append((*cells, *metrics, f"{run.seconds:.0f} s"))
    more = len(names) - len(shown)
    note = [f"{more} more metrics are in {TABLE}"] if more else []
    return "\n".join([*align(rows, left=len(keys) + 1), *note])


def _sorted(run: SweptRun) -> Iterator[tuple[str, float]]:
    return iter(sorted(run.metrics.items()))


def _key(override: str) -> str:
    return override.partition("=")[0]


def _value(run: Sequence[str], key: str) -> str:
    return next(each.partition("=")[2] for each in run if _key(each) == key)


def _name(values: Mapping[str, str]) -> str:
    """Returns the name of a run's folder.

    >>> _name({"model.lr": "1e-3", "data.path": "a/b"})
    'model.lr=1e-3+data.path=a_b'
    """
    text = "+".join(f"{key}={value}" for key, value in values.items())
    return re.sub(r"[^\w.=+-]+", "_", printable(text))[:150]
