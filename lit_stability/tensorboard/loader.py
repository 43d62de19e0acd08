"""What TensorBoard loads at its start, by the entry point of group ``tensorboard_plugins``.

An error in here would keep TensorBoard from starting, and every import would delay it: beside
TensorBoard's own base classes nothing is imported before `StabilityLoader.load`, and never torch.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins import base_plugin

log = logging.getLogger("tensorboard")


class StabilityLoader(base_plugin.TBLoader):  # type: ignore[misc]
    """Loads the Stability tab, or does without it and says why."""

    def fix_flags(self, flags: Any) -> None:
        """Ask for enough samples of a tag, unless the user has: TensorBoard keeps 10 else.

        Args:
            flags: TensorBoard's, whose ``samples_per_plugin`` is a dict.
        """
        from lit_stability.tensorboard.tags import PLUGIN, SAMPLES

        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN, SAMPLES)

    def load(self, context: Any) -> Any:
        """The plugin; None, which TensorBoard passes over, where it cannot be loaded.

        Args:
            context: TensorBoard's ``TBContext``.
        """
        try:
            from lit_stability.tensorboard.plugin import StabilityPlugin

            return StabilityPlugin(context)
        except Exception as error:
            log.warning(
                "TensorBoard goes on without the Stability tab (%s: %s); reinstall lit-stability",
                *(type(error).__name__, error),
            )
            return None
