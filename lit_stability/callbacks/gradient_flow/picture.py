"""Draws gradients per layer, which shows where they vanish or explode.

Needs matplotlib, which the extra ``plots`` installs; it is imported when something is drawn.
Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from lit_stability.callbacks.gradient_flow.layer_rows import (
    LayerRow,
    joined_norm,
    layer_rows,
    norm_of,
)
from lit_stability.figures import BLUE, INK, MUTED, RED, label_rows, new_figure, plain_label
from lit_stability.measurement.step_stats import GradientDetail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 3
"""The colour scale spans this many powers of ten above and below the median layer."""
_EARLIER = "#dfe6ee"
"""Tint of the range of norms in earlier steps."""


def draw_gradient_flow(
    details: Sequence[GradientDetail],
    *,
    title: str = "",
    history: Sequence[Sequence[GradientDetail]] = (),
    layers: int = 40,
) -> Figure:
    """Draws the gradients layer by layer, the first layer on top, on a logarithmic axis.

    In each row a dot marks the norm, coloured by its ratio to the median of all rows. A line joins
    the dots, so that a gradient that vanishes or explodes along the layers is a slanted line. Next
    to the dot are the elements: a bar from the magnitude of the mean to the largest magnitude, with
    a stroke at the root mean square, and triangles at the smallest and largest element, without
    their signs. The tint behind a dot spans the norms of earlier steps. The right panel shows the
    share of elements that are exactly 0. A non-finite gradient is a red cross at the right end; a
    gradient that is all zero is a blue square at the left end.

    If there are more parameters than `layers`, `layer_rows` joins them. Then each parameter has a
    small dot at its norm, the bar starts at their smallest root mean square, and the share of zeros
    is the largest of any parameter.

    Drawing and rendering take 0.35 to 0.55 s for 22 rows of 198 parameters, 0.55 to 0.7 s for 40
    rows of 414 (110 dpi, 20 earlier steps; medians of 9, two runs on a shared 2-core CPU machine).

    Args:
        details: gradient details of one step, in the order of the model.
        title: title of the picture.
        history: details of earlier steps.
        layers: largest number of rows.

    Returns:
        The figure.

    Raises:
        MatplotlibMissing: if matplotlib is not installed.
        ValueError: if there are no details, or `layers` is less than 1.
    """
    if not details:
        raise ValueError("details is empty; measure some with GradientMonitor(details_every=50)")
    rows = layer_rows(details, layers)
    figure = new_figure()
    figure.set_size_inches(9.0, 2.0 + 0.2 * max(4, len(rows)))
    flow, zeros = figure.subplots(1, 2, sharey=True, width_ratios=[6, 1])
    earlier_norms = [{each.name: norm_of(each) for each in step} for step in history]
    earlier = [_earlier(row, earlier_norms) for row in rows]
    limits = _limits(rows, earlier)
    _draw_earlier(flow, earlier)
    mesh = _draw_norms(flow, rows, limits)
    for y, row in enumerate(rows):
        _draw_elements(flow, y, row)
        _draw_zeros(zeros, y, row)
    _set_axes(flow, zeros, rows, limits)
    _draw_legend(figure, mesh, zeros, earlier=bool(history), joined=len(rows) < len(details))
    figure.suptitle(_heading(details, rows, title), fontsize=9, color=INK)
    return figure


def _limits(rows: Sequence[LayerRow], earlier: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the ends of the axis, whole powers of ten, from norms and elements of all rows.

    Root mean squares count only in rows of one parameter. Otherwise a parameter far below the
    others of its row would stretch the axis for all, such as the bias of the attention keys, whose
    gradient is zero except for rounding.
    """
    values = [row.norm for row in rows] + [norm for norms in earlier for norm in norms]
    values += [abs(end) for row in rows for end in (row.minimum, row.maximum)]
    values += [_rms(each) for row in rows if len(row.members) == 1 for each in row.finite]
    drawable = [value for value in values if 0 < value < math.inf] or [1.0]
    low, high = math.log10(min(drawable)), math.log10(max(drawable))
    return 10.0 ** max(-300, math.floor(low - 0.3)), 10.0 ** min(300, math.ceil(high + 0.1))


def _rms(detail: GradientDetail) -> float:
    return math.hypot(detail.mean, detail.std)


def _earlier(row: LayerRow, earlier_norms: Sequence[Mapping[str, float]]) -> list[float]:
    """Returns the norms of the same parameters in earlier steps, if finite and above zero."""
    norms = (row.norm_among(norms) for norms in earlier_norms)
    return [norm for norm in norms if norm and math.isfinite(norm)]


def _draw_earlier(axis: Axes, earlier: Sequence[Sequence[float]]) -> None:
    for y, norms in enumerate(earlier):
        if norms:
            width = max(norms) - min(norms)
            axis.barh(y, width, left=min(norms), height=0.8, color=_EARLIER, zorder=0)


def _draw_norms(axis: Axes, rows: Sequence[LayerRow], limits: tuple[float, float]) -> Any:
    """Draws the dots and the line that joins them; returns the artist for the colour bar."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    drawable = [(row.norm, y) for y, row in enumerate(rows) if 0 < row.norm < math.inf]
    middle = median(norm for norm, _ in drawable) if drawable else 1.0
    colours = LinearSegmentedColormap.from_list("flow", [BLUE, "#b0b0b0", RED])
    ratio = LogNorm(10.0**-_DECADES, 10.0**_DECADES, clip=True)
    for y, row in enumerate(rows):
        if len(row.members) > 1:
            members = [norm_of(each) for each in row.finite if norm_of(each)]
            axis.plot(members, [y] * len(members), ".", color=MUTED, markersize=2.5, zorder=2)
        if not math.isfinite(row.norm):
            _mark_nonfinite(axis, y, row, limits[1])
        elif row.norm == 0:
            axis.plot(limits[0], y, "s", color=BLUE, clip_on=False, markersize=5, zorder=4)
    along = [row.norm if 0 < row.norm < math.inf else math.nan for row in rows]
    axis.plot(along, range(len(rows)), color=MUTED, linewidth=0.8, zorder=1)
    return axis.scatter(
        [norm for norm, _ in drawable],
        [y for _, y in drawable],
        c=[norm / middle for norm, _ in drawable],
        norm=ratio,
        cmap=colours,
        s=34,
        edgecolors="white",
        linewidths=0.6,
        zorder=3,
    )


def _mark_nonfinite(axis: Axes, y: int, row: LayerRow, end: float) -> None:
    """Draws a cross at the end of the axis, with the number of non-finite parameters."""
    bad = [each for each in row.members if not math.isfinite(each.norm)]
    kind = "NaN" if any(math.isnan(each.norm) for each in bad) else "Inf"
    count = f" in {len(bad)} of {len(row.members)}" if len(row.members) > 1 else ""
    axis.axhspan(y - 0.5, y + 0.5, color=RED, alpha=0.08, linewidth=0, zorder=0)
    axis.plot(end, y, "X", color=RED, clip_on=False, markersize=7, zorder=4)
    axis.annotate(
        kind + count,
        (end, y),
        xytext=(-7, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=6.5,
        fontweight="bold",
        color=RED,
        zorder=5,
    )


def _draw_elements(axis: Axes, y: int, row: LayerRow) -> None:
    """Draws the spread of the elements; for joined parameters, of all of them together."""
    if not row.finite or row.all_zero:
        return
    largest = max(abs(row.minimum), abs(row.maximum))
    rms = [_rms(each) for each in row.finite if _rms(each)]
    start = min(rms, default=largest)
    if len(row.members) == 1:
        axis.plot(rms, [y] * len(rms), "|", color=INK, markersize=5, markeredgewidth=0.8, zorder=2)
        start = abs(row.members[0].mean) or start
    axis.plot([start, largest], [y, y], color="#c9c9c9", linewidth=1.6, zorder=1)
    for marker, value in (("<", row.minimum), (">", row.maximum)):
        if value:
            axis.plot(abs(value), y, marker, color=INK, markersize=2.6, zorder=2)


def _draw_zeros(axis: Axes, y: int, row: LayerRow) -> None:
    if row.all_zero:
        axis.axhspan(y - 0.5, y + 0.5, color=BLUE, alpha=0.10, linewidth=0, zorder=0)
    if row.zero_share > 0:
        axis.barh(y, 100 * row.zero_share, height=0.6, color=BLUE, alpha=0.55)


def _set_axes(
    flow: Axes, zeros: Axes, rows: Sequence[LayerRow], limits: tuple[float, float]
) -> None:
    flow.set_xscale("log")
    flow.set_xlim(*limits)
    flow.set_ylim(len(rows) - 0.4, -0.6)
    names = [row.name for row in rows]
    label_rows(flow, names)
    for text, row in zip(flow.get_yticklabels(), rows, strict=True):
        text.set_color(INK if math.isfinite(row.norm) else RED)
    flow.grid(axis="x", color="#ececec", linewidth=0.6)
    flow.set_axisbelow(True)
    flow.set_xlabel("gradient, unclipped", fontsize=8, color=INK)
    zeros.set_xlim(0, 100)
    zeros.set_xticks([0, 50, 100], ["0", "50", "100"])
    zeros.set_xlabel("zeros, %", fontsize=8, color=INK)
    for axis in (flow, zeros):
        axis.tick_params(axis="x", labelsize=7, color=MUTED, labelcolor=INK)
        axis.tick_params(axis="y", left=False)
        axis.spines[:].set_color("#d0d0d0")
    flow.tick_params(axis="x", which="minor", bottom=False)
    zeros.tick_params(axis="y", labelleft=False)


def _draw_legend(figure: Figure, mesh: Any, axis: Axes, *, earlier: bool, joined: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(marker: str, label: str, color: str = INK, size: float = 4) -> Any:
        return Line2D([], [], marker=marker, color=color, markersize=size, label=label, ls="none")

    handles: list[Any] = [
        mark("o", "norm", MUTED, 6),
        *([mark(".", "norm of each parameter", MUTED)] if joined else []),
        *([] if joined else [mark("|", "root mean square", size=5)]),
        Line2D([], [], color="#c9c9c9", label=f"{'rms' if joined else '|mean|'} to largest"),
        mark("<", "|min|", size=3),
        mark(">", "|max| of elements", size=3),
        *([Patch(color=_EARLIER, label="norm in earlier steps")] if earlier else []),
        mark("X", "NaN or Inf", RED, 6),
        mark("s", "all zero", BLUE),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=7,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.3,
        handlelength=1.4,
    )
    bar = figure.colorbar(mesh, ax=axis, aspect=30, pad=0.08, extend="both")
    bar.set_label("norm over that of the median row", fontsize=7, color=INK)
    bar.ax.tick_params(labelsize=7, labelcolor=INK)
    bar.outline.set_visible(False)


def _heading(details: Sequence[GradientDetail], rows: Sequence[LayerRow], title: str) -> str:
    bad = sum(not math.isfinite(each.norm) for each in details)
    zero = sum(norm_of(each) == 0 for each in details)
    norm = joined_norm([norm_of(each) for each in details])
    facts = [f"norm of all gradients {'NaN' if math.isnan(norm) else format(norm, '.3g')}"]
    facts += [f"{bad} of {len(details)} not finite"] if bad else []
    facts += [f"{zero} of {len(details)} all zero"] if zero else []
    if len(rows) < len(details):
        facts.append(f"{len(details)} parameters in {len(rows)} rows")
    return "\n".join([*([plain_label(title)] if title else []), plain_label("; ".join(facts))])
