"""Writes figures to the loggers that accept images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_stability.outside import to_each

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(loggers: Sequence[Any], tag: str, figure: Figure, step: int) -> bool:
    """Writes a figure to every logger whose experiment has ``add_image`` or ``add_figure``.

    ``add_image`` is preferred, because TensorBoard's ``add_figure`` uses pyplot, whose global state
    belongs to the user.

    Args:
        loggers: Lightning's loggers, any number of them.
        tag: name of the image.
        figure: drawn on an Agg canvas.
        step: the loggers' own step, which never decreases.

    Returns:
        Whether any logger accepted the figure.
    """

    def write(logger: Any) -> bool:
        experiment: Any = getattr(logger, "experiment", None)
        if callable(getattr(experiment, "add_image", None)):
            experiment.add_image(tag, _pixels(figure), step, dataformats="HWC")
        elif callable(getattr(experiment, "add_figure", None)):
            experiment.add_figure(tag, figure, step, close=False)
        else:
            return False
        return True

    return to_each(loggers, write)


def _pixels(figure: Figure) -> Any:
    """Returns the figure's pixels, uint8, shape ``(height, width, 3)``."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
