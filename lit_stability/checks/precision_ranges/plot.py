"""Draws the magnitudes of each layer next to the ranges of the formats.

Needs matplotlib, which the extra ``plots`` installs; it is imported on the first drawing. Does not
use or change the state of pyplot. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2
from typing import TYPE_CHECKING, Any

from lit_stability.checks.precision_ranges.limits import TOLERATED
from lit_stability.checks.precision_ranges.report import KINDS, Kind, RangeReport, RangeRow
from lit_stability.checks.precision_ranges.table import worst_first
from lit_stability.checks.precision_ranges.verdict import Verdict, judge
from lit_stability.checks.text_table import format_share
from lit_stability.figures import (
    BLUE,
    INK,
    MUTED,
    RED,
    label_rows,
    new_figure,
    plain_label,
)
from lit_stability.measurement.float_formats import (
    BFLOAT16,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT16,
    FloatFormat,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RULERS = (FLOAT16, BFLOAT16, FLOAT8_E5M2, FLOAT8_E4M3FN)
_FAINTEST = 1e-5
"""Share of a layer's elements that has the faintest colour; smaller shares have the same."""
_MARGIN = 9
"""Powers of two kept free at both ends of the axis, for the printed shares."""
_OVERFLOW, _LOST = RED, BLUE
_LINES: tuple[tuple[Any, str, Callable[[FloatFormat], float]], ...] = (
    ("-", "largest", lambda number_format: number_format.overflow_limit),
    ("--", "smallest normal", lambda number_format: number_format.smallest_normal),
    (":", "smallest subnormal", lambda number_format: number_format.smallest_subnormal),
)


def draw_ranges(report: RangeReport, *, title: str = "", layers: int = 40) -> Figure:
    """Draws one plot each for weights, activations and gradients, with one line per layer.

    A darker colour means a larger share of the layer's nonzero elements with that magnitude. Bars
    above each plot show the ranges of the formats, with subnormal numbers in a lighter tone;
    vertical lines show the limits of fp16. Next to a layer is the share that overflows in fp16 and,
    for gradients, the share that becomes zero in fp16 without a loss scale.

    Args:
        report: The measurement.
        title: Title of the figure.
        layers: Largest number of layers; the worst are drawn, in the order of the model.

    Raises:
        MatplotlibMissing: If matplotlib is not installed.
        ValueError: If `layers` is less than 1.
    """
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")
    figure = new_figure()
    shown = _worst_layers(report, layers)
    kinds = [kind for kind in KINDS if any(row.layer in shown for row in report.of(kind))]
    limits = _limits(report.rows)
    figure.set_size_inches(3.0 + 3.1 * len(kinds), 2.4 + 0.19 * len(shown))
    heights = [0.17 * len(_RULERS), 0.19 * max(4, len(shown))]
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex=True, height_ratios=heights)
    mesh: Any = None
    for column, kind in enumerate(kinds):
        _draw_rulers(axes[0][column], kind, first=column == 0)
        rows = {row.layer: row for row in report.of(kind)}
        mesh = _draw_panel(axes[1][column], [rows.get(name) for name in shown], limits) or mesh
        axes[1][column].set_yticks(range(len(shown)), [""] * len(shown))
    label_rows(axes[1][0], shown)
    _draw_legend(figure, axes, mesh)
    figure.suptitle(_heading(report, title, len(shown)), fontsize=9, color=INK)
    return figure


def _worst_layers(report: RangeReport, most: int) -> list[str]:
    worst = list(dict.fromkeys(row.layer for row in worst_first(report.rows)))[:most]
    return [name for name in report.layers if name in worst]


def _limits(rows: Sequence[RangeRow]) -> tuple[int, int]:
    """Returns the exponents at the ends of the axis: fp16, and all values but rare small ones."""
    high, low = 17, -26
    for row in rows:
        spread = row.exponents()
        high = max([high, *spread])
        low = min([low, *(k - 1 for k, n in spread.items() if n > 1e-4 * row.nonzero)])
    return low - _MARGIN, high + _MARGIN


def _draw_rulers(axis: Axes, kind: Kind, first: bool) -> None:
    """Draws the ranges of the formats, one below the other."""
    for y, number_format in enumerate(_RULERS):
        low, normal = log2(number_format.smallest_subnormal), log2(number_format.smallest_normal)
        color = INK if number_format == FLOAT16 else MUTED
        axis.barh(
            y, log2(number_format.overflow_limit) - normal, left=normal, height=0.55, color=color
        )
        axis.barh(y, normal - low, left=low, height=0.55, color=color, alpha=0.35)
    axis.set_ylim(len(_RULERS) - 0.5, -0.5)
    axis.set_yticks(range(len(_RULERS)), [r.name if first else "" for r in _RULERS], fontsize=7)
    axis.set_title(kind, fontsize=9, color=INK)
    axis.tick_params(bottom=False, left=False, labelbottom=False, labelcolor=INK)
    axis.spines[:].set_visible(False)


def _draw_panel(axis: Axes, rows: Sequence[RangeRow | None], limits: tuple[int, int]) -> Any:
    """Draws the layers of one kind; returns the mesh for the colour bar."""
    from matplotlib.colors import LogNorm

    low, high = limits
    image = [[0.0] * (high - low) for _ in rows]
    for line, row in zip(image, rows, strict=True):
        for exponent, count in row.exponents().items() if row else ():
            if row and exponent > low + _MARGIN:
                line[exponent - 1 - low] = max(count / row.nonzero, _FAINTEST)
    masked = [[value or float("nan") for value in line] for line in image]
    norm = LogNorm(_FAINTEST, 1.0)
    extent = [i - 0.5 for i in range(len(rows) + 1)]
    mesh = axis.pcolormesh(range(low, high + 1), extent, masked, norm=norm, cmap="magma_r")
    axis.hlines(extent, low, high, color="white", linewidth=0.8)
    _draw_limits(axis, FLOAT16, limits)
    for y, row in enumerate(rows):
        if row:
            _write_shares(axis, y, row, limits)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(low, high)
    ticks = range(-(-low // 10) * 10, high + 1, 10)
    axis.set_xticks(ticks, [f"$2^{{{t}}}$" for t in ticks], fontsize=7)
    axis.tick_params(left=False, labelcolor=INK, color=MUTED)
    axis.spines[:].set_color("#d0d0d0")
    return mesh


def _draw_limits(axis: Axes, number_format: FloatFormat, limits: tuple[int, int]) -> None:
    """Draws lines at the limits of a format, and a tint where values are lost."""
    end, lost = log2(number_format.overflow_limit), log2(number_format.zero_limit)
    for style, _, limit in _LINES:
        at = log2(limit(number_format))
        axis.axvline(at, color="white", linewidth=2.0)  # visible on dark cells
        axis.axvline(at, linestyle=style, color=INK, linewidth=0.9)
    axis.axvspan(end, limits[1], color=_OVERFLOW, alpha=0.10, linewidth=0, zorder=0)
    axis.axvspan(limits[0], lost, color=_LOST, alpha=0.10, linewidth=0, zorder=0)


def _write_shares(axis: Axes, y: int, row: RangeRow, limits: tuple[int, int]) -> None:
    """Writes the shares of a layer that fp16 loses, each at its end of the axis."""
    style: dict[str, Any] = {"va": "center", "fontsize": 6.5, "fontweight": "bold"}
    if row.overflowing(FLOAT16):
        share = format_share(row.overflowing(FLOAT16) / row.elements)
        axis.text(limits[1] - 0.7, y, share, ha="right", color=_OVERFLOW, **style)
    lost = row.vanishing(FLOAT16) / max(1, row.nonzero)
    if lost > TOLERATED and "gradients" in row.kind:
        axis.text(limits[0] + 0.7, y, format_share(lost), ha="left", color=_LOST, **style)


def _draw_legend(figure: Figure, axes: Any, mesh: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], linestyle=style, color=INK, linewidth=0.8, label=f"{name} in float16")
        for style, name, _ in _LINES
    ]
    handles += [
        Patch(color=_OVERFLOW, alpha=0.3, label="overflows in float16, %"),
        Patch(color=_LOST, alpha=0.3, label="becomes zero in float16, % of gradients"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    bar = figure.colorbar(mesh, ax=axes[:, -1], aspect=30, pad=0.02)
    bar.set_label("share of the elements above zero", fontsize=7, color=INK)
    bar.ax.tick_params(labelsize=7, labelcolor=INK)
    bar.outline.set_visible(False)


def _heading(report: RangeReport, title: str, shown: int) -> str:
    verdicts = "; ".join(_in_short(judge(report, judged)) for judged in (FLOAT16, BFLOAT16))
    of = f", the {shown} worst of {len(report.layers)} layers" if shown < len(report.layers) else ""
    batches = f"{report.batches} batch{'es' if report.batches != 1 else ''}"
    first = [plain_label(title)] if title else []
    return "\n".join([*first, verdicts, f"magnitudes in float32 over {batches}{of}"])


def _in_short(verdict: Verdict) -> str:
    if verdict.status == "fits with a loss scale" and verdict.scale:
        ends = f"$2^{{{verdict.scale.lowest}}}$ to $2^{{{verdict.scale.highest}}}$"
        return f"{verdict.format}: {verdict.status} of {ends}"
    return f"{verdict.format}: {verdict.status}"
