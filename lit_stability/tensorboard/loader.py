"""The plugin loader, which TensorBoard imports at its start from the ``tensorboard_plugins`` group.

An error here would prevent TensorBoard from starting, and every import would delay it. Therefore
only TensorBoard's base classes are imported before `StabilityLoader.load`, and torch never.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins import base_plugin

log = logging.getLogger("tensorboard")


class StabilityLoader(base_plugin.TBLoader):  # type: ignore[misc]
    """Loads the Stability tab; if that fails, logs why, and TensorBoard starts without it."""

    def fix_flags(self, flags: Any) -> None:
        """Requests enough samples per tag unless the user did: TensorBoard's default is 10.

        Args:
            flags: TensorBoard's flags, with ``samples_per_plugin`` as a dict.
        """
        from lit_stability.tensorboard.tags import PLUGIN, SAMPLES

        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN, SAMPLES)

    def load(self, context: Any) -> Any:
        """Returns the plugin, or None if it cannot be loaded; TensorBoard then skips it.

        Args:
            context: TensorBoard's ``TBContext``.
        """
        try:
            from lit_stability.tensorboard.plugin import StabilityPlugin

            return StabilityPlugin(context)
        except Exception as error:
            log.warning(
                "the Stability tab cannot be loaded (%s: %s); TensorBoard starts without it: "
                "reinstall lit-stability",
                *(type(error).__name__, error),
            )
            return None
