"""`AutomaticSuite`: adds the default suite to every Trainer if ``LIT_STABILITY_AUTO=1``."""

from __future__ import annotations

import weakref
from typing import Any

from lit_stability.callbacks import stability_callbacks
from lit_stability.callbacks.gradient_monitor.reporter import log
from lit_stability.callbacks.gradient_monitor.validation import require_package, why_unwatchable
from lit_stability.callbacks.hooks import StabilityCallback
from lit_stability.callbacks.requirements import (
    require_supported_strategy,
    require_whole_optimizers,
)
from lit_stability.lightning_package import Callback, LightningModule, Trainer
from lit_stability.trainer_internals import callbacks_of


class AutomaticSuite(StabilityCallback):
    """Adds `stability_callbacks` at the start of a fit, unless one of them is already there.

    If the Trainer or the module already has one of them, the user has made a choice: nothing is
    added, and the log reports it. Nothing is added either where an explicit suite would refuse the
    fit or stand aside, because its strategy is not supported or nothing is trained; the log gives
    the reason. The suite is inserted before the callbacks that write checkpoints. Lightning adds
    this callback to every Trainer if ``LIT_STABILITY_AUTO=1``, see `lit_stability.registration`.
    """

    def __init__(self) -> None:
        self._added_to: weakref.ref[Trainer] | None = None
        self._added: list[Callback] = []
        self._logged = False

    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_added_to": None, "_added": []}

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
        try:
            require_package(trainer, self)
            require_supported_strategy(trainer, self)
        except (ValueError, RuntimeError) as reason:
            log.info("LIT_STABILITY_AUTO=1 adds nothing: %s", _first_sentence(reason))
            return
        after = existing.index(self) + 1
        trainer.callbacks[after:after] = suite  # type: ignore[attr-defined]
        self._added_to, self._added, self._logged = weakref.ref(trainer), suite, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the suite again if it cannot work with the optimizers; logs what was added."""
        if self._added_to is None or self._added_to() is not trainer:
            return
        reason: str | Exception | None = why_unwatchable(trainer, pl_module)
        try:
            require_whole_optimizers(trainer, self._added[-1])
        except RuntimeError as refused:
            reason = refused
        if reason is not None:
            self._remove(trainer, pl_module)
            log.info("LIT_STABILITY_AUTO=1 adds nothing: %s", _first_sentence(reason))
            return
        if not self._logged:
            added = ", ".join(type(each).__name__ for each in self._added)
            log.info("LIT_STABILITY_AUTO=1 adds %s", added)
            self._logged = True

    def _remove(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the suite, of which only ``setup`` has run."""
        own = {id(each) for each in self._added}
        # In place: Lightning is calling the callbacks of this list.
        trainer.callbacks[:] = [  # type: ignore[attr-defined]
            each for each in callbacks_of(trainer) if id(each) not in own
        ]
        for each in self._added:
            each.teardown(trainer, pl_module, "fit")
        self._added_to, self._added = None, []


def _first_sentence(reason: str | Exception) -> str:
    """Returns what is the matter, without the advice for an explicit suite."""
    return str(reason).split(". ")[0].split("; ")[0]
