"""`AutomaticSuite`: puts the default suite into a Trainer whose owner did not write it there."""

from __future__ import annotations

import weakref

from lightning.pytorch import LightningModule, Trainer

from lit_stability.callbacks import stability_callbacks
from lit_stability.callbacks.gradient_monitor.reporter import log
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.trainer_internals import callbacks_of


class AutomaticSuite(StabilityCallback):
    """Adds `stability_callbacks` at the start of a fit, and never doubles what is there.

    Where the Trainer or the module has one of them already, its owner has chosen: nothing is
    added, and it is said. They come before the callbacks that write checkpoints. Lightning puts it
    into every Trainer where ``LIT_STABILITY_AUTO=1``, see `lit_stability.registration`.
    """

    def __init__(self) -> None:
        self._added_to: weakref.ref[Trainer] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the suite; Lightning goes on to call ``setup`` of what was added."""
        there = callbacks_of(trainer)
        # One works: the package may be installed twice, in a clone and beside it.
        first = next(each for each in there if isinstance(each, AutomaticSuite))
        if stage != "fit" or first is not self or (self._added_to and self._added_to() is trainer):
            return
        suite = stability_callbacks()
        kinds = tuple(type(each) for each in suite)
        if chosen := [type(each).__name__ for each in there if isinstance(each, kinds)]:
            log.info("LIT_STABILITY_AUTO=1 adds nothing: the Trainer has %s", ", ".join(chosen))
            return
        after = there.index(self) + 1
        trainer.callbacks[after:after] = suite  # type: ignore[attr-defined]
        self._added_to = weakref.ref(trainer)
        log.info("LIT_STABILITY_AUTO=1 adds %s", ", ".join(kind.__name__ for kind in kinds))
