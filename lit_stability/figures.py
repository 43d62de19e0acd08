"""Shared helpers for plots: a figure without global state, layer names as row labels.

Needs matplotlib, which the extra ``plots`` installs; it is imported when a figure is drawn. Imports
neither torch nor Lightning.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from lit_stability.printing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RED, BLUE = "#222222", "#8a8a8a", "#b2182b", "#2166ac"
_LONGEST = 52
"""Maximum number of characters of a layer name."""


class MatplotlibMissing(ImportError):
    """Raised if matplotlib is not installed; the message says how to install it."""


def new_figure() -> Figure:
    """Creates an empty figure without pyplot, whose global state belongs to the user.

    Raises:
        MatplotlibMissing: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing(
            "matplotlib is not installed; pip install 'lit-stability[plots]'"
        ) from error
    figure = Figure(layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """Renders a figure as PNG; equal figures give equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def plain_label(text: str) -> str:
    r"""Returns text for a label, in which matplotlib looks for formulas between dollar signs.

    >>> print(plain_label("layer.$n$.weight"))
    layer.\$n\$.weight
    """
    return printable(text).replace("$", "\\$")


def label_rows(axis: Axes, names: Sequence[str]) -> None:
    """Labels rows with names, without their shared prefix; long names are cut in the middle.

    Args:
        axis: the axis whose rows are at 0, 1, 2 and so on.
        names: names of the rows; a name in parentheses is not a submodule.
    """
    shared = shared_start(names)
    short = [name.removeprefix(shared) for name in names]
    half = _LONGEST // 2
    cut = [n if len(n) <= _LONGEST else f"{n[: half - 3]}...{n[-half:]}" for n in short]
    axis.set_yticks(range(len(names)), [*map(plain_label, cut)], fontsize=7)
    if shared:
        axis.set_ylabel(plain_label(f"in {shared[:-1]}"), fontsize=7, color=MUTED)


def shared_start(names: Sequence[str]) -> str:
    """Returns the module prefix that all names share, including the final dot.

    >>> shared_start(["net.block.0", "net.block.1", "(input)"])
    'net.block.'
    """
    modules = [name.split(".")[:-1] for name in names if not name.startswith("(")]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    return "".join(f"{parts[0]}." for parts in same)
