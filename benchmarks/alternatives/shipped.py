"""No protection, Lightning's two protections, and this suite.

Imports Lightning and `lit_stability`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks.spike import SpikeDetection

from benchmarks.alternatives.protection import Protection
from lit_stability import GradientMonitor, Incident, TrainingStopped, stability_callbacks


class Nothing(Protection):
    """A Trainer without protection."""

    name = "none"


class Clipping(Protection):
    """``Trainer(gradient_clip_val=1.0)``."""

    name = "clipping at 1.0"

    def trainer_options(self) -> dict[str, Any]:
        """See `Protection`."""
        return {"gradient_clip_val": 1.0}


class LightningSpikeDetection(Protection):
    """Lightning's `SpikeDetection`: ends the fit if the loss is not finite or has tripled."""

    name = "SpikeDetection"
    raises_alarms = True

    def __init__(self) -> None:
        self.callback: SpikeDetection | None = None

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        self.callback = SpikeDetection(exclude_batches_path=str(folder / "skip_batches.json"))
        return [self.callback]

    def alarms(self) -> int:
        """Returns the number of spikes; each excludes two batches."""
        return 0 if self.callback is None else len(self.callback.bad_batches) // 2

    def stops(self) -> tuple[type[BaseException], ...]:
        """See `Protection`."""
        return (TrainingSpikeException,)


class Suite(Protection):
    """``stability_callbacks()`` with default options."""

    name = "this suite"
    raises_alarms = True

    def __init__(self) -> None:
        self.monitor: GradientMonitor | None = None

    def callbacks(self, folder: Path) -> list[Callback]:
        """See `Protection`."""
        suite = stability_callbacks()
        self.monitor = next(c for c in suite if isinstance(c, GradientMonitor))
        return suite

    @property
    def incidents(self) -> list[Incident]:
        """All incidents so far."""
        return [] if self.monitor is None else self.monitor.incidents

    def alarms(self) -> int:
        """See `Protection`."""
        return len(self.incidents)

    def stops(self) -> tuple[type[BaseException], ...]:
        """See `Protection`."""
        return (TrainingStopped,)
