"""The health report and the comparison as pictures, layer by layer in the order of the state dict.

Needs matplotlib, which the extra ``plots`` installs; it is loaded when something is drawn. Imports
neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_stability.checks.checkpoint.comparison import Comparison
from lit_stability.checks.checkpoint.report import HealthReport, MomentHealth, TensorHealth
from lit_stability.checks.finding import count_by_severity
from lit_stability.figures import BLUE, INK, MUTED, RED, label_rows, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ORANGE = "#d9822b"


@dataclass(frozen=True)
class _Mark:
    """One value of a row: where, how drawn, and what the legend says."""

    value: float
    marker: str
    label: str
    color: str = INK


def draw_health(report: HealthReport, *, title: str = "", layers: int = 40) -> Figure:
    """Draw weights and, where there are any, the optimizer's moments, on logarithmic axes.

    On the left the root mean square of each tensor and its largest element, its name red with a
    finding that is an error, orange with a warning; a cross at the right end where elements are
    NaN or Inf, a square at the left end where all are 0. On the right the root mean squares of the
    two moments, that of the second under its root.

    Of more than `layers` tensors those with a finding are kept, then those with most elements.

    Args:
        report: of a checkpoint.
        title: of the picture.
        layers: most rows.

    Raises:
        MatplotlibMissing: if matplotlib is not installed.
        ValueError: if `layers` is less than 1.
    """
    shown = _shown(report, layers)
    moments = {each.name: each for each in report.moments}
    panels = [("weights", [_weight_marks(each) for each in shown])]
    if any(each.name in moments for each in shown):
        panels.append(
            ("optimizer state", [_moment_marks(moments.get(each.name)) for each in shown])
        )
    colors = _colors(report)
    bad = [bool(each.damaged) for each in shown]
    figure, axes = _panels([each.name for each in shown], panels, bad)
    for text, each in zip(axes[0].get_yticklabels(), shown, strict=True):
        text.set_color(colors.get(each.name, INK))
    all_ = [each for each in report.tensors if _drawable(each)]
    of = f", {len(shown)} of {len(all_)} tensors" if len(shown) < len(all_) else ""
    counts = count_by_severity([*report.of("error"), *report.of("warning")])
    _title(figure, title, (counts or "nothing found") + of)
    return figure


def draw_comparison(comparison: Comparison, *, title: str = "", layers: int = 40) -> Figure:
    """Draw by how much each tensor has changed, relative to its norm, on a logarithmic axis.

    Of more than `layers` tensors those that changed most are kept; unchanged ones are left out. A
    cross at the right end where elements are NaN or Inf, or where a tensor was all zero before.

    Args:
        comparison: of two checkpoints.
        title: of the picture.
        layers: most rows.

    Raises:
        MatplotlibMissing: if matplotlib is not installed.
        ValueError: if `layers` is less than 1, or nothing has changed.
    """
    _require(layers)
    moved = [each for each in comparison.changes if not each.frozen]
    if not moved:
        raise ValueError(f"none of {len(comparison.changes)} tensors has changed")
    shown = moved[:layers]
    panels = [
        ("norm of the change over the norm before", [[_Mark(c.relative, "o", "")] for c in shown]),
        ("largest change of an element", [[_Mark(c.largest, ">", "")] for c in shown]),
    ]
    bad = [bool(each.non_finite_after) or not math.isfinite(each.relative) for each in shown]
    figure, _ = _panels([each.name for each in shown], panels, bad)
    of = f", the {len(shown)} that changed most of {len(moved)}" if len(shown) < len(moved) else ""
    _title(figure, title, f"together {comparison.relative:.3g} of their norm{of}")
    return figure


def _shown(report: HealthReport, most: int) -> list[TensorHealth]:
    _require(most)
    rows = [each for each in report.tensors if _drawable(each)]
    suspects = _colors(report)
    kept = sorted(rows, key=lambda each: (each.name not in suspects, -each.elements))[:most]
    return [each for each in rows if each in kept]


def _drawable(tensor: TensorHealth) -> bool:
    return tensor.kind != "integer" and tensor.elements > 0 and tensor.same_memory is None


def _require(layers: int) -> None:
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")


def _colors(report: HealthReport) -> dict[str, str]:
    """Colours of the names that a finding has, the worse one counts."""
    found: dict[str, str] = {}
    for finding in report.findings:
        color = {"error": RED, "warning": _ORANGE}.get(finding.severity)
        for name in finding.where if color else ():
            found.setdefault(name.split(" = ")[0], color or INK)
    return found


def _weight_marks(tensor: TensorHealth) -> list[_Mark]:
    if tensor.zeros == tensor.elements:
        return [_Mark(0.0, "s", "all zero", BLUE)]
    return [
        _Mark(tensor.rms, "o", "root mean square", BLUE),
        _Mark(tensor.largest, ">", "largest element"),
    ]


def _moment_marks(moment: MomentHealth | None) -> list[_Mark]:
    if moment is None:
        return []
    norms, count = moment.norms, math.sqrt(max(1, moment.elements))
    first = norms.get("exp_avg", norms.get("momentum_buffer"))
    marks = [] if first is None else [_Mark(first / count, "D", "rms of the momentum", MUTED)]
    if "exp_avg_sq" in norms:
        root = math.sqrt(norms["exp_avg_sq"] / count)
        marks.append(_Mark(root, "s", "root of the second moment's rms", _ORANGE))
    return marks


def _panels(
    names: Sequence[str], panels: Sequence[tuple[str, Sequence[Sequence[_Mark]]]], bad: list[bool]
) -> tuple[Figure, Any]:
    figure = new_figure()
    figure.set_size_inches(5.0 + 3.0 * len(panels), 1.8 + 0.2 * max(4, len(names)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (what, rows) in zip(axes, panels, strict=True):
        _draw_rows(axis, rows)
        _set_axis(axis, what, [mark.value for marks in rows for mark in marks])
    for y in (y for y, each in enumerate(bad) if each):
        _mark_end(axes[0], 1.0, y, "X", RED)
        axes[0].axhspan(y - 0.5, y + 0.5, color=RED, alpha=0.08, linewidth=0, zorder=0)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    label_rows(axes[0], names)
    _draw_legend(figure, panels, any(bad))
    return figure, axes


def _draw_rows(axis: Axes, rows: Sequence[Sequence[_Mark]]) -> None:
    for y, marks in enumerate(rows):
        good = [mark for mark in marks if 0 < mark.value < math.inf]
        if len(good) > 1:
            ends = [mark.value for mark in good]
            axis.plot([min(ends), max(ends)], [y, y], color="#c9c9c9", linewidth=1.4, zorder=1)
        for mark in good:
            size = 3 if mark.marker == ">" else 4.5
            axis.plot(mark.value, y, mark.marker, color=mark.color, markersize=size, zorder=2)
        for mark in (mark for mark in marks if mark.value == 0 and mark.marker == "s"):
            _mark_end(axis, 0.0, y, mark.marker, mark.color)


def _mark_end(axis: Axes, end: float, y: int, marker: str, color: str) -> None:
    """A mark at an end of the axis, 0 or 1, for what has no place on it."""
    place = axis.get_yaxis_transform()
    axis.plot(end, y, marker, color=color, transform=place, clip_on=False, markersize=6, zorder=3)


def _set_axis(axis: Axes, what: str, values: Sequence[float]) -> None:
    good = [value for value in values if 0 < value < math.inf] or [1.0]
    low, high = math.log10(min(good)), math.log10(max(good))
    axis.set_xscale("log")
    axis.set_xlim(10 ** max(-300, math.floor(low - 0.1)), 10 ** min(300, math.ceil(high + 0.1)))
    axis.set_title(what, fontsize=9, color=INK)
    axis.grid(axis="x", color="#ececec", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", which="minor", bottom=False)
    axis.tick_params(labelsize=7, left=False, color=MUTED, labelcolor=INK)
    axis.spines[:].set_color("#d0d0d0")


def _draw_legend(figure: Figure, panels: Sequence[tuple[str, Any]], crossed: bool) -> None:
    from matplotlib.lines import Line2D

    marks = {mark.label: mark for _, rows in panels for row in rows for mark in row if mark.label}
    cross = {"NaN or Inf": _Mark(0.0, "X", "NaN or Inf", RED)} if crossed else {}
    handles = [
        Line2D([], [], marker=m.marker, color=m.color, markersize=4, label=m.label, ls="none")
        for m in (marks | cross).values()
    ]
    if not handles:
        return
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=7,
        frameon=False,
        handletextpad=0.3,
    )


def _title(figure: Figure, title: str, told: str) -> None:
    figure.suptitle("\n".join([*([title] if title else []), told]), fontsize=9, color=INK)
