"""`AutomaticSuite`: adds the default suite to every Trainer if ``LIT_STABILITY_AUTO=1``."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks import stability_callbacks
from lit_stability.callbacks.gradient_monitor.reporter import log
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.trainer_internals import callbacks_of


class AutomaticSuite(StabilityCallback):
    """Adds `stability_callbacks` at the start of a fit, unless one of them is already there.

    If the Trainer or the module already has one of them, the user has made a choice: nothing is
    added, and the log reports it. The suite is inserted before the callbacks that write
    checkpoints. Lightning adds this callback to every Trainer if ``LIT_STABILITY_AUTO=1``, see
    `lit_stability.registration`.
    """

    def __init__(self) -> None:
        self._added_to: weakref.ref[Trainer] | None = None

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_added_to": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the suite; Lightning then calls ``setup`` of the added callbacks too."""
        existing = callbacks_of(trainer)
        # Only the first adds: there are two if the package is installed and in a clone as well.
        first = next(each for each in existing if isinstance(each, AutomaticSuite))
        if stage != "fit" or first is not self or (self._added_to and self._added_to() is trainer):
            return
        suite = stability_callbacks()
        kinds = tuple(type(each) for each in suite)
        if chosen := [type(each).__name__ for each in existing if isinstance(each, kinds)]:
            log.info("LIT_STABILITY_AUTO=1 adds nothing: the Trainer has %s", ", ".join(chosen))
            return
        after = existing.index(self) + 1
        trainer.callbacks[after:after] = suite  # type: ignore[attr-defined]
        self._added_to = weakref.ref(trainer)
        log.info("LIT_STABILITY_AUTO=1 adds %s", ", ".join(kind.__name__ for kind in kinds))
