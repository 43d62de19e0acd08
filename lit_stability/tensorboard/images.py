"""Pictures, to the loggers that take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(loggers: Sequence[Any], tag: str, figure: Figure, step: int) -> bool:
    """Give a figure to every logger whose experiment has ``add_image``, or else ``add_figure``.

    ``add_figure`` of TensorBoard does the same by way of pyplot, whose global state is the user's.

    Args:
        loggers: Lightning's loggers, any number of them.
        tag: name of the picture.
        figure: drawn on a canvas of Agg.
        step: the loggers' own step, which never goes back.

    Returns:
        Whether there was one.
    """
    taken = False
    pixels = None
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if callable(getattr(experiment, "add_image", None)):
            pixels = _pixels(figure) if pixels is None else pixels
            experiment.add_image(tag, pixels, step, dataformats="HWC")
        elif callable(getattr(experiment, "add_figure", None)):
            experiment.add_figure(tag, figure, step, close=False)
        else:
            continue
        taken = True
    return taken


def _pixels(figure: Figure) -> Any:
    """The picture as bytes, shape ``(height, width, 3)``."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
