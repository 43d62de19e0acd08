"""The default suite in every Trainer, without a line of code: ``LIT_STABILITY_AUTO=1``.

Lightning calls `callbacks` for each Trainer that is made wherever this package is installed, by
the entry point of group ``lightning.pytorch.callbacks_factory``. It must cost nothing and do
nothing unless it is asked to: nothing heavy is imported before.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "LIT_STABILITY_AUTO"


def callbacks() -> list[Any]:
    """What a Trainer is given: nothing, or with ``LIT_STABILITY_AUTO=1`` an `AutomaticSuite`.

    Raises:
        ValueError: if the variable is neither ``1`` nor ``0`` nor empty.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE} must be 1, for the default suite in every Trainer, or 0, got {asked!r}; "
            f"write {VARIABLE}=1, or unset it"
        )
    if asked != "1":
        return []
    from lit_stability.callbacks.automatic_suite import AutomaticSuite

    return [AutomaticSuite()]
