"""The health report in words and as tables, the worst first.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import isfinite
from statistics import median

from lit_stability.checks.checkpoint.report import (
    Finding,
    HealthReport,
    MomentHealth,
    RunHealth,
    TensorHealth,
)

_WIDTH = 100
_NAMES = 4
"""Names of a finding that are told without `--all`."""


def format_report(report: HealthReport, limit: int | None = 15) -> str:
    """Put a report in words: the run, what was found, and the tensors.

    Tensors that a finding names come first, then those with the largest root mean square.

    Args:
        report: of a checkpoint.
        limit: most rows of a table; None for every row and every name.

    Raises:
        ValueError: if `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for every row")
    lines = [*_run(report), ""]
    for finding in report.findings:
        lines += _finding(finding, None if limit is None else _NAMES)
    lines += _verdict(report)
    for table, rest in (_tensors(report, limit), _moments(report, limit)):
        if table:
            lines += ["", *table, *rest]
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
        options = [f"lr {number(group['lr'])}"] if "lr" in group else []
        options += [f"betas {tuple(group['betas'])}"] if group.get("betas") else []
        options += [f"eps {group['eps']:g}"] if "eps" in group else []
        lines.append(f"{group['where']}: {len(group['params'])} parameters, " + ", ".join(options))
    lines += [f"loss scale {run.scaler['scale']:g}"] if "scale" in run.scaler else []
    return lines + _history(run) + _suite(run)


def _history(run: RunHealth) -> list[str]:
    """What was ordinary in the last steps: the span of the middle nine tenths."""
    spans = []
    for what, values in (
        ("loss", [loss for _, loss, _ in run.history]),
        ("gradient norm", [norm for _, _, norm in run.history]),
    ):
        good = sorted(v for v in values if isfinite(v))
        if len(good) >= 20:
            low, high = good[len(good) // 20], good[-1 - len(good) // 20]
            spans.append(f"{what} {number(low)} to {number(high)}, median {number(median(good))}")
    if not spans:
        return []
    steps = f"{run.history[0][0]} to {run.history[-1][0]}"
    return [f"steps {steps}, nine tenths: " + "; ".join(spans)]


def _suite(run: RunHealth) -> list[str]:
    state = run.callbacks
    told = [f"incidents so far {state['incidents']}"] if "incidents" in state else []
    told += [f"precision {state['precision']}"] if "precision" in state else []
    left = ", ".join(f"{n} {sort}" for sort, n in state.get("budget left", {}).items())
    told += [f"budget left {left}"] if left else []
    return [*(["; ".join(told)] if told else []), *state.get("gradient norms by phase", ())]


def _finding(finding: Finding, limit: int | None) -> list[str]:
    """A heading, the reason, and what to do, wrapped."""
    lines = [f"{finding.severity}: {finding.what}: {few(finding.where, limit)}"]
    for start, text in (("  ", finding.why), ("  - ", finding.remedy)):
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=start,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return [*lines, ""]


def _verdict(report: HealthReport) -> list[str]:
    counts = [(len(report.of("error")), "error"), (len(report.of("warning")), "warning")]
    counts.append((len(report.of("note")), "note"))
    told = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts if n)
    return [f"found: {told}" if told else "nothing found"]


def _tensors(report: HealthReport, limit: int | None) -> tuple[list[str], list[str]]:
    rows = [t for t in report.tensors if t.kind != "integer" and t.elements]
    order = {name: i for i, name in enumerate(_suspects(report))}
    rows.sort(key=lambda t: (order.get(t.name, len(order)), -t.rms))
    head = ("tensor", "shape", "dtype", "rms", "mean", "std", "min", "max", "zero", "NaN/Inf")
    table = aligned([head, *(_cells(t) for t in rows[:limit])], left=3)
    return (table if rows else []), _more(len(rows) - len(rows[:limit]), "tensors")


def _moments(report: HealthReport, limit: int | None) -> tuple[list[str], list[str]]:
    order = {name: i for i, name in enumerate(_suspects(report))}
    rows = sorted(report.moments, key=lambda m: (order.get(m.name, len(order)), -(m.ratio or 0.0)))
    keys = list(dict.fromkeys(key for each in rows for key in each.norms))
    head = (
        "optimizer state of",
        "updates",
        *(f"|{key}|" for key in keys),
        "|m|/sqrt(v)",
        "NaN/Inf",
    )
    table = aligned([head, *(_moment_cells(m, keys) for m in rows[:limit])], left=1)
    return (table if rows else []), _more(len(rows) - len(rows[:limit]), "of the optimizer")


def _suspects(report: HealthReport) -> list[str]:
    return list(dict.fromkeys(n.split(" = ")[0] for f in report.findings for n in f.where))


def _more(count: int, what: str) -> list[str]:
    return [f"{count} more {what}; --all shows them"] if count > 0 else []


def _cells(tensor: TensorHealth) -> tuple[str, ...]:
    bad = tensor.elements - tensor.finite
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    numbers = (tensor.rms, tensor.mean, tensor.std, tensor.minimum, tensor.maximum)
    zero = f"{tensor.zero_share:.1%}" if tensor.zeros else "."
    name = tensor.name + (f" (is {tensor.same_memory})" if tensor.same_memory else "")
    return (name, shape, tensor.dtype, *map(number, numbers), zero, str(bad) if bad else ".")


def _moment_cells(moment: MomentHealth, keys: Sequence[str]) -> tuple[str, ...]:
    bad = sum(moment.non_finite.values())
    return (
        moment.name,
        "-" if moment.step is None else f"{moment.step:g}",
        *(number(moment.norms[key]) if key in moment.norms else "-" for key in keys),
        "-" if moment.signal is None else number(moment.signal),
        str(bad) if bad else ".",
    )


def number(value: float) -> str:
    """Three digits, as short as they can be told.

    >>> number(0.0), number(0.0123456), number(12345.6), number(1e-12)
    ('0', '0.0123', '12346', '1.0e-12')
    """
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else _long(value)


def _long(value: float) -> str:
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.1e}"


def few(names: Sequence[str], limit: int | None) -> str:
    """Some names in a row, and how many more there are.

    >>> few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = len(names) - len(names[:limit])
    return ", ".join(names[:limit]) + (f" and {more} more" if more else "")


def aligned(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns side by side, some to the left, the others to the right.

    Args:
        table: rows of as many cells each, the heading first.
        left: columns of words.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines
