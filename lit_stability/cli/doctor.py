"""The command `lit-stability doctor`: examines a checkpoint or the metric log of a run.

May import the configuration at module level; imports torch and matplotlib only when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_stability.cli.log_doctor import READ, examine_logs, logs_at
from lit_stability.cli.run_folders import newest_run
from lit_stability.errors import ConfigError
from lit_stability.incidents.log import to_json
from lit_stability.printing import printable
from lit_stability.training_state.atomic_write import write_and_keep

if TYPE_CHECKING:
    from lit_stability.checks.checkpoint.comparison import Comparison
    from lit_stability.checks.checkpoint.report import HealthReport

_EXIT_CODES = """\
exit codes:
  0  no finding is an error
  1  an error was found in PATH, or in OTHER
  2  the command line or a file is invalid; nothing was examined
"""


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to a parser.

    Args:
        commands: Sub-commands of the parser.
    """
    doctor = commands.add_parser(
        "doctor",
        help="examine a checkpoint for damage, or the metric log of any run",
        description="Measure every weight, buffer and optimizer moment of a checkpoint, and report "
        "problems; with OTHER, also report what changed from the first to the second. Code inside "
        "of a checkpoint is never run. Or read the metric log of a run, trained with this package "
        "or without it, and report what went wrong, when, and the likely causes.",
        epilog="examples:\n  lit-stability doctor runs/NAME\n"
        "  lit-stability doctor before.ckpt after.ckpt --plot changes.png\n"
        "  lit-stability doctor lightning_logs/version_3 --loss train_loss --json\n\n"
        + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    doctor.add_argument(
        "checkpoint",
        metavar="PATH",
        type=Path,
        help="a checkpoint, a state dict, the folder of an incident, or the folder of a run (its "
        "last known good checkpoint). Or a metric log, or a folder without a known good checkpoint "
        f"that has some: {READ}",
    )
    doctor.add_argument(
        "other", metavar="OTHER", type=Path, nargs="?", help="a later checkpoint to compare with"
    )
    doctor.add_argument("--all", action="store_true", help="print every row of every table")
    doctor.add_argument(
        "--loss",
        metavar="NAME",
        help="the training loss of a metric log; by default chosen by name",
    )
    doctor.add_argument(
        "--json", action="store_true", help="print all measurements as JSON instead of text"
    )
    doctor.add_argument("--out", metavar="FILE.json", type=Path, help="write all measurements")
    doctor.add_argument("--plot", metavar="FILE.png", type=Path, help="draw them, layer by layer")
    doctor.set_defaults(command=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Examines checkpoints or metric logs, prints and writes the reports; returns the exit code.

    Raises:
        ConfigError: If a file cannot be read or written, or an option is invalid.
    """
    _check_targets(args)
    logs = logs_at(args.checkpoint, wanted=args.loss is not None)
    if logs:
        content, healthy = examine_logs(logs, args)
    elif args.loss is not None:
        raise ConfigError(f"{args.checkpoint}: has no metric log, so --loss has no use: {READ}")
    else:
        content, healthy = _examine_checkpoints(args)
    if args.json:
        print(to_json(content))
    if args.out is not None:
        _write(args.out, to_json(content) + "\n", quiet=args.json)
    return 0 if healthy else 1


def _examine_checkpoints(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Examines one or two checkpoints; returns all measurements, and whether none has an error."""
    limit = None if args.all else 15
    given = [path for path in (args.checkpoint, args.other) if path is not None]
    examined = [_examine(path, limit, quiet=args.json) for path in given]
    comparison = _compare(examined, limit, quiet=args.json) if len(examined) > 1 else None
    content: dict[str, Any] = {
        key: {"file": str(result.file), **result.report.as_dict()}
        for key, result in zip(("checkpoint", "other"), examined, strict=False)
    }
    if comparison is not None:
        content["comparison"] = comparison.as_dict()
    if args.plot is not None:
        _plot(args.plot, examined, comparison, quiet=args.json)
    return content, all(result.report.healthy for result in examined)


@dataclass(frozen=True)
class _Examined:
    """A loaded checkpoint and its report."""

    file: Path
    checkpoint: Mapping[str, Any]
    report: HealthReport


def _check_targets(args: argparse.Namespace) -> None:
    """Raises an error for output files that cannot be written, before minutes of work."""
    for option, path, suffix in (("--out", args.out, ".json"), ("--plot", args.plot, ".png")):
        if path is not None and path.suffix != suffix:
            raise ConfigError(f"{option} {path}: must end in {suffix}")
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: no such folder {path.parent}")


def _examine(given: Path, limit: int | None, *, quiet: bool) -> _Examined:
    from lit_stability.checks.checkpoint.examination import examine
    from lit_stability.checks.checkpoint.load import (
        NoCheckpointError,
        find_file,
        load,
        load_gradients,
        wrong_checksum,
    )
    from lit_stability.checks.checkpoint.table import format_report

    try:
        file = find_file(newest_run(given))
    except NoCheckpointError as error:
        raise ConfigError(f"{error}; nor has it a metric log: {READ}") from error
    checkpoint = load(file)
    try:
        gradients = load_gradients(file)
        report = examine(checkpoint, gradients=gradients, damage=wrong_checksum(file))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    chosen = f", the last known good of {given}" if given.is_dir() and file.parent != given else ""
    if not quiet:
        print(printable(f"{file}{chosen}\n{format_report(report, limit)}\n", keep="\n"))
    return _Examined(file, checkpoint, report)


def _compare(examined: Sequence[_Examined], limit: int | None, *, quiet: bool) -> Comparison:
    from lit_stability.checks.checkpoint.comparison import format_comparison
    from lit_stability.checks.checkpoint.difference import compare

    before, after = examined
    comparison = compare(before.checkpoint, after.checkpoint)
    text = f"{before.file} -> {after.file}\n{format_comparison(comparison, limit)}\n"
    if not quiet:
        print(printable(text, keep="\n"))
    return comparison


def _plot(
    path: Path, examined: Sequence[_Examined], comparison: Comparison | None, *, quiet: bool
) -> None:
    """Draws the comparison if there is one, else the gradients of an incident, else the weights."""
    from lit_stability.callbacks.gradient_flow.picture import draw_gradient_flow
    from lit_stability.checks.checkpoint.plot import draw_comparison, draw_health
    from lit_stability.figures import MatplotlibMissing, to_png

    first = examined[0]
    try:
        if comparison is not None:
            title = f"{first.file} -> {examined[1].file}"
            figure = draw_comparison(comparison, title=title)
        elif first.report.gradients:
            figure = draw_gradient_flow(first.report.gradients, title=str(first.file))
        else:
            figure = draw_health(first.report, title=str(first.file))
        _write(path, to_png(figure), quiet=quiet)
    except MatplotlibMissing as error:
        print(f"{path} was not written: {error}", file=sys.stderr)


def _write(path: Path, content: str | bytes, *, quiet: bool) -> None:
    """Writes a file atomically; an existing file is renamed and kept."""
    try:
        write_and_keep(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from error
    if not quiet:
        print(f"wrote {path}")
