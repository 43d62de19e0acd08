"""Adds the default suite to every Trainer without code, with ``LIT_STABILITY_AUTO=1``.

If this package is installed, Lightning calls `callbacks` for each new Trainer, through an entry
point: group ``lightning.pytorch.callbacks_factory``, or ``pytorch_lightning.callbacks_factory`` in
the other package. Unless the variable is set, it returns an empty list and imports nothing heavy.
Where the callbacks are imported already, it also checks those of the new Trainer.
"""

from __future__ import annotations

import os
import sys
from typing import Any

VARIABLE = "LIT_STABILITY_AUTO"


def callbacks() -> list[Any]:
    """Returns the callbacks for a new Trainer: an `AutomaticSuite` if enabled, otherwise none.

    Raises:
        ValueError: if the variable is neither ``1`` nor ``0`` nor empty, or if the Trainer has a
            callback of this package twice.
        TypeError: if the Trainer's callbacks have a list in them.
    """
    if "lit_stability.callbacks" in sys.modules:
        from lit_stability.callbacks.new_trainer import check_new_trainer

        check_new_trainer()
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE} must be 1, for the default suite in every Trainer, or 0, got {value!r}; "
            f"set {VARIABLE}=1, or unset it"
        )
    if value != "1":
        return []
    from lit_stability.callbacks.automatic_suite import AutomaticSuite

    return [AutomaticSuite()]
