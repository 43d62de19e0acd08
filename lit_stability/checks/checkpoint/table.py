"""Prints a health report: the run, the findings (worst first), and tables of tensors and moments.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import median

from lit_stability.checks.checkpoint.report import (
    HealthReport,
    MomentHealth,
    RunHealth,
    TensorHealth,
)
from lit_stability.checks.finding import SHOWN_NAMES, count_by_severity
from lit_stability.checks.text_table import align, format_number, more_rows
from lit_stability.printing import printable


def format_report(report: HealthReport, limit: int | None = 15) -> str:
    """Returns a report as text: the run, the findings, the tensors and the optimizer state.

    Tensors that a finding names come first, then those with the largest root mean square.

    Args:
        report: Of a checkpoint.
        limit: Largest number of rows of a table; None for all rows and all names.

    Raises:
        ValueError: If `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for every row")
    lines = [*_run(report), ""]
    for finding in report.findings:
        lines += [finding.text(names=None if limit is None else SHOWN_NAMES), ""]
    counts = count_by_severity(report.findings)
    lines.append(f"found: {counts}" if counts else "nothing found")
    for table, hidden in (_tensors(report, limit), _moments(report, limit)):
        if table:
            lines += ["", *table, *hidden]
    return "\n".join(lines)


def _run(report: HealthReport) -> list[str]:
    run, tensors = report.run, [t for t in report.tensors if t.same_memory is None]
    weights = sum(t.elements for t in tensors if t.kind == "parameter")
    place = [] if run.global_step is None else [f"step {run.global_step}"]
    place += [] if run.epoch is None else [f"epoch {run.epoch}"]
    lines = [
        ", ".join([run.source, *place]),
        f"{len(report.tensors)} tensors, {weights:,} parameters",
    ]
    for group in run.groups:
        options = [f"lr {format_number(group['lr'])}"] if "lr" in group else []
        options += [f"betas {tuple(group['betas'])}"] if group.get("betas") else []
        options += [f"eps {group['eps']:g}"] if "eps" in group else []
        lines.append(f"{group['where']}: {len(group['params'])} parameters, " + ", ".join(options))
    lines += [f"loss scale {run.scaler['scale']:g}"] if "scale" in run.scaler else []
    return [printable(line) for line in lines + _history(run) + _suite(run)]


def _history(run: RunHealth) -> list[str]:
    """Returns the range of the middle nine tenths of recent losses and gradient norms."""
    ranges = []
    for what, values in (
        ("loss", [loss for _, loss, _ in run.history]),
        ("gradient norm", [norm for _, _, norm in run.history]),
    ):
        finite = sorted(v for v in values if isfinite(v))
        if len(finite) >= 20:
            low, high = finite[len(finite) // 20], finite[-1 - len(finite) // 20]
            ranges.append(
                f"{what} {format_number(low)} to {format_number(high)}, "
                f"median {format_number(median(finite))}"
            )
    if not ranges:
        return []
    steps = f"{run.history[0][0]} to {run.history[-1][0]}"
    return [f"steps {steps}, nine tenths: " + "; ".join(ranges)]


def _suite(run: RunHealth) -> list[str]:
    """Returns what this package's callbacks saved: incidents, precision, budget, phases."""
    state = run.callbacks
    entries = [f"incidents so far {state['incidents']}"] if "incidents" in state else []
    entries += [f"precision {state['precision']}"] if "precision" in state else []
    left = ", ".join(f"{n} {sort}" for sort, n in state.get("budget left", {}).items())
    entries += [f"budget left {left}"] if left else []
    line = ["; ".join(entries)] if entries else []
    return [*line, *state.get("gradient norms by phase", ())]


def _tensors(report: HealthReport, limit: int | None) -> tuple[list[str], list[str]]:
    """Returns the table of tensors, and the line that counts the rows it hides."""
    rows = [t for t in report.tensors if t.kind != "integer" and t.elements]
    order = {name: i for i, name in enumerate(_named(report))}
    rows.sort(key=lambda t: (order.get(t.name, len(order)), -t.rms))
    head = ("tensor", "shape", "dtype", "rms", "mean", "std", "min", "max", "zero", "NaN/Inf")
    table = align([head, *(_cells(t) for t in rows[:limit])], left=3)
    return (table if rows else []), more_rows(len(rows) - len(rows[:limit]), "tensors")


def _moments(report: HealthReport, limit: int | None) -> tuple[list[str], list[str]]:
    """Returns the table of the optimizer state, and the line that counts the rows it hides."""
    order = {name: i for i, name in enumerate(_named(report))}
    rows = sorted(report.moments, key=lambda m: (order.get(m.name, len(order)), -(m.ratio or 0.0)))
    keys = list(dict.fromkeys(key for moment in rows for key in moment.norms))
    head = (
        "optimizer state of",
        "updates",
        *(f"|{key}|" for key in keys),
        "|m|/sqrt(v)",
        "NaN/Inf",
    )
    table = align([head, *(_moment_cells(m, keys) for m in rows[:limit])], left=1)
    return (table if rows else []), more_rows(len(rows) - len(rows[:limit]), "of the optimizer")


def _named(report: HealthReport) -> list[str]:
    """Returns the tensors that a finding names, worst first."""
    return list(dict.fromkeys(n.split(" = ")[0] for f in report.findings for n in f.where))


def _cells(tensor: TensorHealth) -> tuple[str, ...]:
    bad = tensor.elements - tensor.finite
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    numbers = (tensor.rms, tensor.mean, tensor.std, tensor.minimum, tensor.maximum)
    zero = f"{tensor.zero_share:.1%}" if tensor.zeros else "."
    name = tensor.name + (f" (is {tensor.same_memory})" if tensor.same_memory else "")
    return (name, shape, tensor.dtype, *map(format_number, numbers), zero, str(bad) if bad else ".")


def _moment_cells(moment: MomentHealth, keys: Sequence[str]) -> tuple[str, ...]:
    bad = sum(moment.non_finite.values())
    return (
        moment.name,
        "-" if moment.step is None else f"{moment.step:g}",
        *(format_number(moment.norms[key]) if key in moment.norms else "-" for key in keys),
        "-" if moment.signal is None else format_number(moment.signal),
        str(bad) if bad else ".",
    )
