"""Draws the health report and the comparison, layer by layer in the order of the state dict.

Needs matplotlib, which the extra ``plots`` installs; it is imported on the first drawing. Imports
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
from lit_stability.figures import BLUE, INK, MUTED, RED, label_rows, new_figure, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ORANGE = "#d9822b"


@dataclass(frozen=True)
class _Mark:
    """One value of a row, with its marker and its label in the legend."""

    value: float
    marker: str
    label: str
    color: str = INK


def draw_health(report: HealthReport, *, title: str = "", layers: int = 40) -> Figure:
    """Draws the weights and, if there are any, the optimizer's moments, on logarithmic axes.

    The left axis shows the root mean square and the largest element of each tensor. Names with an
    error are red, names with a warning orange. A cross at the right end marks NaN or Inf elements,
    a square at the left end marks tensors that are all 0. The right axis shows the root mean square
    of the first moment, and the square root of that of the second.

    If there are more than `layers` tensors, those with a finding are drawn, then the largest.

    Args:
        report: Of a checkpoint.
        title: Title of the figure.
        layers: Largest number of rows.

    Raises:
        MatplotlibMissing: If matplotlib is not installed.
        ValueError: If `layers` is less than 1.
    """
    shown = _shown(report, layers)
    moments = {moment.name: moment for moment in report.moments}
    panels = [("weights", [_weight_marks(tensor) for tensor in shown])]
    if any(tensor.name in moments for tensor in shown):
        panels.append(
            ("optimizer state", [_moment_marks(moments.get(tensor.name)) for tensor in shown])
        )
    colors = _colors(report)
    bad = [bool(tensor.damaged) for tensor in shown]
    figure, axes = _panels([tensor.name for tensor in shown], panels, bad)
    for text, tensor in zip(axes[0].get_yticklabels(), shown, strict=True):
        text.set_color(colors.get(tensor.name, INK))
    drawable = [tensor for tensor in report.tensors if _drawable(tensor)]
    of = f", {len(shown)} of {len(drawable)} tensors" if len(shown) < len(drawable) else ""
    counts = count_by_severity([*report.of("error"), *report.of("warning")])
    _title(figure, title, (counts or "nothing found") + of)
    return figure


def draw_comparison(comparison: Comparison, *, title: str = "", layers: int = 40) -> Figure:
    """Draws the change of each tensor, relative to its norm, on a logarithmic axis.

    Unchanged tensors are not drawn; if more than `layers` tensors changed, those that changed most
    are. A cross at the right end marks tensors with NaN or Inf, or that were all zero before.

    Args:
        comparison: Of two checkpoints.
        title: Title of the figure.
        layers: Largest number of rows.

    Raises:
        MatplotlibMissing: If matplotlib is not installed.
        ValueError: If `layers` is less than 1, or no tensor has changed.
    """
    _require(layers)
    changed = [change for change in comparison.changes if not change.frozen]
    if not changed:
        raise ValueError(f"none of {len(comparison.changes)} tensors has changed")
    shown = changed[:layers]
    panels = [
        ("norm of the change over the norm before", [[_Mark(c.relative, "o", "")] for c in shown]),
        ("largest change of an element", [[_Mark(c.largest, ">", "")] for c in shown]),
    ]
    bad = [bool(c.non_finite_after) or not math.isfinite(c.relative) for c in shown]
    figure, _ = _panels([c.name for c in shown], panels, bad)
    part = len(shown) < len(changed)
    of = f", the {len(shown)} that changed most of {len(changed)}" if part else ""
    _title(figure, title, f"together {comparison.relative:.3g} of their norm{of}")
    return figure


def _shown(report: HealthReport, most: int) -> list[TensorHealth]:
    _require(most)
    """Returns the tensors to draw: those with a finding, then the largest, in model order."""
    rows = [tensor for tensor in report.tensors if _drawable(tensor)]
    named = _colors(report)
    kept = sorted(rows, key=lambda tensor: (tensor.name not in named, -tensor.elements))[:most]
    return [tensor for tensor in rows if tensor in kept]


def _drawable(tensor: TensorHealth) -> bool:
    return tensor.kind != "integer" and tensor.elements > 0 and tensor.same_memory is None


def _require(layers: int) -> None:
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")


def _colors(report: HealthReport) -> dict[str, str]:
    """Returns the colour of each name with an error or a warning, by its worst finding."""
    colors: dict[str, str] = {}
    for finding in report.findings:
        color = {"error": RED, "warning": _ORANGE}.get(finding.severity)
        for name in finding.where if color else ():
            colors.setdefault(name.split(" = ")[0], color or INK)
    return colors


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
    for y in (y for y, is_bad in enumerate(bad) if is_bad):
        _mark_end(axes[0], 1.0, y, "X", RED)
        axes[0].axhspan(y - 0.5, y + 0.5, color=RED, alpha=0.08, linewidth=0, zorder=0)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    label_rows(axes[0], names)
    _draw_legend(figure, panels, any(bad))
    return figure, axes


def _draw_rows(axis: Axes, rows: Sequence[Sequence[_Mark]]) -> None:
    for y, marks in enumerate(rows):
        inside = [mark for mark in marks if 0 < mark.value < math.inf]
        if len(inside) > 1:
            ends = [mark.value for mark in inside]
            axis.plot([min(ends), max(ends)], [y, y], color="#c9c9c9", linewidth=1.4, zorder=1)
        for mark in inside:
            size = 3 if mark.marker == ">" else 4.5
            axis.plot(mark.value, y, mark.marker, color=mark.color, markersize=size, zorder=2)
        for mark in (mark for mark in marks if mark.value == 0 and mark.marker == "s"):
            _mark_end(axis, 0.0, y, mark.marker, mark.color)


def _mark_end(axis: Axes, end: float, y: int, marker: str, color: str) -> None:
    """Draws a mark at an end of the axis, 0 or 1, for a value that a log axis cannot show."""
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


def _title(figure: Figure, title: str, summary: str) -> None:
    figure.suptitle(
        "\n".join([*([plain_label(title)] if title else []), summary]), fontsize=9, color=INK
    )
