"""A layout for TensorBoard's Custom Scalars tab, for installations without the plugin.

Imports neither torch nor TensorBoard; it uses the experiment of a logger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYOUT = {
    "stability": {
        "loss": ["Multiline", ["(?i).*loss(?!_scale).*"]],
        "gradient norm, clip threshold": [
            "Multiline",
            ["stability/grad_norm(_\\d+)?$", "stability/clip_threshold(_\\d+)?$"],
        ],
        "learning rate": ["Multiline", ["stability/learning_rate(_\\d+)?$"]],
        "update / weight": ["Multiline", ["stability/update_ratio(_\\d+)?$"]],
        "factors on learning rate and gradient": [
            "Multiline",
            [
                "stability/learning_rate_factor(_\\d+)?$",
                "stability/clip_coefficient(_\\d+)?$",
            ],
        ],
        "loss scale (fp16)": ["Multiline", ["stability/loss_scale(_\\d+)?$"]],
        "incidents": ["Multiline", ["stability/incidents(_\\d+)?$"]],
    }
}
"""Category -> chart -> chart type and regular expressions of tags."""

_TAG = b"custom_scalars__config__"


def write_layout(experiment: Any) -> None:
    """Writes the layout, unless the run has one: TensorBoard shows only the last layout.

    Args:
        experiment: experiment of a logger; ignored if it does not accept layouts.
    """
    if not callable(getattr(experiment, "add_custom_scalars", None)):
        return
    experiment.flush()
    folder = getattr(experiment, "log_dir", None)
    if folder is None or not any(map(_has_layout, Path(folder).glob("*tfevents*"))):
        experiment.add_custom_scalars(LAYOUT)


def _has_layout(file: Path) -> bool:
    """Returns whether an event file has a layout; only its first MiB is read."""
    with file.open("rb") as stream:
        return _TAG in stream.read(2**20)
